"""What the tests of the dataset program share: a stage built of files, what came of it, and the files themselves."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from program_tools import make_request, run_program

from tasks.data.rows import SPLITS, Row, read_split
from tuneline.workspace.protocol import Input, Request, Result

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALL_TRAIN = {"test": 0.0}
USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": content} for role, content in (("user", "2 + 2?"), ("assistant", "4"), ("system", "Be brief."))
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
GYM = {"type": "reasoning_gym", "task": "chain_sum", "size": 60, "config": {"max_terms": 3, "max_digits": 1}}


@dataclass
class Build:
    """A stage built, and what came of it."""

    request: Request
    result: Result
    events: list[dict[str, Any]]

    def rows(self, name: str = "train") -> list[Row]:
        return read_split(self.request.payload, name)

    def every(self) -> list[Row]:
        return [row for name in SPLITS for row in self.rows(name)]

    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events if event["type"] == "warning"]

    def report(self) -> str:
        return (self.request.meta / "report.md").read_text(encoding="utf-8")


def build(folder: Path, sources: list[dict[str, Any]], model: Input | None = None, **stage: Any) -> Build:
    """Files of a source are those that its `path` matches in `folder`, as the orchestrator finds them."""
    files = {f"sources.{i}.path": sorted(folder.glob(source["path"])) for i, source in enumerate(sources) if source["type"] == "files"}
    commits = {f"sources.{i}.repo": COMMIT for i, source in enumerate(sources) if source["type"] == "hub"}
    config = {"kind": "dataset", "sources": sources, "split": ALL_TRAIN} | ({"model": "base"} if model else {}) | stage
    inputs = {"model": model} if model else {}
    run = folder / f"run-{len(list(folder.glob('run-*')))}"
    request = make_request(run, config, inputs, files=files, commits=commits)
    return Build(request, *run_program(request))


def build_rows(folder: Path, records: list[Any], source: dict[str, Any] | None = None, **stage: Any) -> Build:
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return build(folder, [{"type": "files", "path": "data.jsonl"} | (source or {})], **stage)


def sums(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + {i}?", "completion": str(2 * i)} for i in range(start, start + count)]


def write_file(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as content:
            writer = csv.DictWriter(content, records[0])
            writer.writeheader()
            writer.writerows(records)
