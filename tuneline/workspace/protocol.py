"""What the orchestrator and a program say to each other: files in a work folder, nothing else.

request.json    written by flows, read by tasks
events.jsonl    appended by tasks while they work, followed by flows
result.json     written last by a program that succeeded, or
failure.json    by one that knows why it did not
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from tuneline.config.spec import STAGES
from tuneline.errors import FailureClass
from tuneline.files import write_atomically
from tuneline.kinds.stage import ProgramStage

SCHEMA = 4


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")

    @classmethod
    def read(cls, path: Path) -> Any:
        return cls.model_validate_json(path.read_bytes())

    def write(self, path: Path) -> None:
        """Atomic: a reader sees the whole message or none."""
        write_atomically(path, self.model_dump_json(by_alias=True, indent=1))


class Input(BaseModel):
    """An upstream artifact. `path` is its payload folder; an Adapter's `base` is the Model it was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    digest: str
    type: Literal["Model", "Adapter", "Dataset", "Report"]
    template: str | None = None
    """sha256 of the chat template it was saved with."""
    base: Input | None = None


class Tree(BaseModel):
    """A source tree of which the request's `files` are the part to read; their names are relative to `folder`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path
    left_out: dict[str, int]
    """Files, and folders as a whole, by reason."""


class Request(Message):
    kind: str
    key: str
    config: dict[str, Any]
    """The whole stage as written, defaults filled in and what is `auto` decided."""
    seed: int
    inputs: dict[str, Input]
    """By slot: `model`, `dataset`, `datasets.0`, ..."""
    files: dict[str, list[Path]]
    """Files and folders named in the stage, absolute, by field: `sources.0.path`."""
    trees: dict[str, Tree] = {}
    """By field, as `files`."""
    commits: dict[str, str]
    """Commits of hub repositories, by field: `hub`, `sources.0.repo`."""
    out: Path
    """Folder to fill: `payload/` (what the next stage reads) and `meta/` (what people read)."""
    work: Path
    """Folder that survives a kill: checkpoints."""
    attempt: int
    resources: dict[str, Any]
    """As `spec.Resources`, micro_batch_size possibly lowered after an out-of-memory."""
    engine: Path | None = None
    """Python of the runtime that holds vLLM, where the stage uses it."""
    join: str = ""
    """The command that the further machines of a training are started with, but for its `--rank`."""

    @property
    def payload(self) -> Path:
        return self.out / "payload"

    @property
    def meta(self) -> Path:
        return self.out / "meta"

    def stage(self) -> ProgramStage:
        stage = STAGES[self.kind].model_validate({**self.config, "resources": self.resources})
        assert isinstance(stage, ProgramStage)
        return stage


class Result(Message):
    metrics: dict[str, FiniteFloat] = {}
    """Flat, finite figures: `loss`, `dataset0/exact_match`, `arc_easy/acc`."""
    info: dict[str, Any] = {}
    """Facts for people. `template`: sha256 of the chat template saved with a Model or Adapter."""


class Failure(Message):
    failure_class: FailureClass = Field(alias="class")
    message: str
    hint: str = ""
    details: str = ""


class Event(BaseModel):
    """One line of events.jsonl."""

    t: float
    type: Literal["progress", "metric", "warning", "sample"]
    step: int | None = None
    total: int | None = None
    name: str | None = None
    value: float | None = None
    message: str | None = None
    data: dict[str, Any] | None = None


class Events:
    """Appends to events.jsonl, one line a call; a killed program leaves whole lines but perhaps the last."""

    def __init__(self, path: Path):
        self._path = path

    def _write(self, **fields: Any) -> None:
        line = {"t": round(time.time(), 3), **{k: v for k, v in fields.items() if v is not None}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def progress(self, step: int, total: int, message: str | None = None) -> None:
        self._write(type="progress", step=step, total=total, message=message)

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        self._write(type="metric", name=name, value=float(value), step=step)

    def warning(self, message: str) -> None:
        self._write(type="warning", message=message)

    def sample(self, message: str, data: dict[str, Any] | None = None) -> None:
        self._write(type="sample", message=message, data=data)
