"""Rows of a Dataset: the one shape in which programs hand them on, and the parquet files that hold them.

A row is a conversation (`messages`), a `prompt` with its `completion`, or plain `text`. `answer` is what a right answer says;
`extra` is a JSON object (the scorer's entry of reasoning-gym, `tools` for the template, `tests` and more for rewards). A row
for rewards alone has no completion: its conversation ends with the user.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuneline.errors import StageFailed

SPLITS = ("train", "validation", "test")
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string())])  # tool_calls: JSON
SCHEMA = pa.schema(
    [("id", pa.string()), ("group", pa.string()), ("source", pa.string()), ("messages", pa.list_(MESSAGE)), ("prompt", pa.string())]
    + [(name, pa.string()) for name in ("completion", "text", "answer", "extra")]
)


@dataclass(frozen=True)
class Row:
    source: str
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    answer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    id: str = ""

    def content(self) -> str:
        """Canonical JSON of what a model sees, whitespace at line ends and around each text ignored: equal rows, equal ids."""
        return _canonical({"messages": self.messages, "prompt": self.prompt, "completion": self.completion, "text": self.text})

    def prompt_messages(self) -> tuple[dict[str, Any], ...] | None:
        """The conversation up to the answer that it ends with; None where the row is no conversation."""
        if self.messages is None or self.messages[-1]["role"] == "user":
            return self.messages
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "assistant"), default=len(self.messages))
        return self.messages[:last]

    def reference(self) -> str | None:
        """What a right answer says: `answer`, else the completion or the last assistant turn; None for plain text."""
        if self.answer is not None:
            return self.answer
        if self.messages is not None and self.messages[-1]["role"] == "assistant":
            content: str | None = self.messages[-1]["content"]  # None where the turn only calls tools
            return content
        return self.completion


def _tidy(value: Any) -> Any:
    if isinstance(value, str):
        return "\n".join(line.rstrip() for line in value.strip().splitlines())
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_tidy(item) for item in value]
    return value


def _canonical(value: Any) -> str:
    return json.dumps(_tidy(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def content_hash(value: Any) -> str:
    """First 16 hex digits of the sha256 of the tidied, canonical JSON of `value`."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


def write_rows(rows: list[Row], path: Path) -> None:
    """Writes parquet in row order, without statistics of time or host: the same rows give the same bytes."""
    records = []
    for row in rows:
        messages = row.messages and [
            {
                "role": m["role"],
                "content": m.get("content"),
                "tool_calls": json.dumps(m["tool_calls"]) if m.get("tool_calls") else None,
            }
            for m in row.messages
        ]
        record = {name: getattr(row, name) for name in SCHEMA.names}
        records.append(record | {"messages": messages, "extra": json.dumps(row.extra, ensure_ascii=False)})
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), path, compression="zstd")


def read_rows(path: Path) -> list[Row]:
    rows = []
    for record in pq.read_table(path, schema=SCHEMA).to_pylist():
        messages = record.pop("messages")
        if messages is not None:
            messages = tuple(
                {"role": m["role"], "content": m["content"]} | ({"tool_calls": json.loads(m["tool_calls"])} if m["tool_calls"] else {})
                for m in messages
            )
        rows.append(Row(**{**record, "messages": messages, "extra": json.loads(record["extra"])}))
    return rows


def row_count(path: Path) -> int:
    """Rows in a parquet file, by its footer alone."""
    return int(pq.read_metadata(path).num_rows)


def read_split(payload: Path, split: str) -> list[Row]:
    """Rows of one split of a Dataset's payload, in their stored order.

    Raises StageFailed(data) where a group stands in another split as well: what is measured on would have been trained on.
    """
    rows = read_rows(payload / f"{split}.parquet")
    groups = {row.group for row in rows}
    for other in SPLITS:
        column = pq.read_table(payload / f"{other}.parquet", columns=["group"])["group"]
        shared = groups & set(column.unique().to_pylist()) if other != split else set()
        if shared:
            message = f"{len(shared)} groups of rows are in the dataset's {split} split and in its {other} split, such as {min(shared)}"
            raise StageFailed("data", message, "force the dataset's stage: its splits share no group")
    return rows
