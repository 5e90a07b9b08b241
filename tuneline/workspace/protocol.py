"""Protocol between the orchestrator and a program: files in a work folder, nothing else.

request.json    written by flows, read by tasks
events.jsonl    appended by tasks while they run, followed by flows
result.json     written last by a program that succeeded, or
failure.json    written by a program that failed with a known reason
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
from tuneline.kinds.trackers import Track
from tuneline.workspace.file_names import META, PAYLOAD

SCHEMA = 6


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")

    @classmethod
    def read(cls, path: Path) -> Any:
        return cls.model_validate_json(path.read_bytes())

    def write(self, path: Path) -> None:
        """Write atomically: a reader sees the whole message or none."""
        write_atomically(path, self.model_dump_json(by_alias=True, indent=1))


class Input(BaseModel):
    """An upstream artifact. `path`: its payload folder; `base`: the Model that an Adapter was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    digest: str
    type: Literal["Model", "Adapter", "Dataset", "Report"]
    template: str | None = None
    """sha256 of the chat template saved with the artifact."""
    base: Input | None = None


class Tree(BaseModel):
    """A source tree. The request's `files` are its selected files; their names in the dataset are relative to `folder`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path
    left_out: dict[str, int]
    """Number of skipped files, and of skipped folders, by reason."""


class Request(Message):
    kind: str
    key: str
    config: dict[str, Any]
    """The stage's fields, with defaults filled in and `auto` resolved."""
    seed: int
    inputs: dict[str, Input]
    """Inputs by slot: `model`, `dataset`, `datasets.0`, ..."""
    files: dict[str, list[Path]]
    """Absolute paths of the stage's outside files and folders, by field: `sources.0.path`."""
    trees: dict[str, Tree] = {}
    """Source trees, by field."""
    commits: dict[str, str]
    """Commits of hub repositories, by field: `hub`, `sources.0.repo`."""
    out: Path
    """Output folder: `payload/` (read by later stages) and `meta/` (read by people)."""
    work: Path
    """Folder that survives a kill; it holds checkpoints."""
    attempt: int
    resources: dict[str, Any]
    """Fields of `Resources`; micro_batch_size may be lowered after an out-of-memory error."""
    engine: Path | None = None
    """Python of the runtime with vLLM, if the stage uses it."""
    history: dict[str, str] = {}
    """Names of the stages that made the inputs, directly or indirectly, by `kind/key`; for kinds that describe how that was done."""
    name: str = ""
    """PIPELINE/STAGE/RUN: the name of a training in its trackers."""
    track: Track | None = None
    """Trackers of a training. Its `log_dir` is absolute."""
    join: str = ""
    """Command that starts the additional machines of a training, without its `--rank`."""

    @property
    def payload(self) -> Path:
        return self.out / PAYLOAD

    @property
    def meta(self) -> Path:
        return self.out / META

    def stage(self) -> ProgramStage:
        stage = STAGES[self.kind].model_validate({**self.config, "resources": self.resources})
        assert isinstance(stage, ProgramStage)
        return stage


class Result(Message):
    metrics: dict[str, FiniteFloat] = {}
    """Flat, finite metrics: `loss`, `dataset0/exact_match`, `arc_easy/acc`."""
    info: dict[str, Any] = {}
    """Facts for reports. `template`: sha256 of the chat template saved with a Model or Adapter."""


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
    """Appends to events.jsonl, one line per call. If the program is killed, only the last line may be incomplete."""

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
