"""Run records: one JSON file a run, written anew whenever a stage ends, so that a killed run leaves what it did."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneline.errors import ConfigError, Problem

SCHEMA = 1
StageStatus = Literal["done", "cached", "failed", "skipped", "refused"]
RunState = Literal["running", "completed", "failed", "refused", "cancelled"]


class StageRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stage: str
    kind: str
    status: StageStatus
    key: str | None = None
    digest: str | None = None
    document: dict[str, Any] | None = None
    """What the key is the hash of: later plans compare with it."""
    artifact: str | None = None
    seconds: float = 0.0
    metrics: dict[str, float] = {}
    message: str = ""


class RunRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")
    run_id: str
    pipeline: str
    overrides: tuple[str, ...] = ()
    started: str
    finished: str | None = None
    state: RunState = "running"
    stages: list[StageRecord] = []


class Runs:
    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, pipeline: str, overrides: tuple[str, ...]) -> RunRecord:
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        return RunRecord(run_id=run_id, pipeline=pipeline, overrides=overrides, started=now.isoformat(timespec="seconds"))

    def save(self, record: RunRecord) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{record.run_id}"
        temporary.write_text(record.model_dump_json(by_alias=True, indent=1), encoding="utf-8")
        temporary.replace(self.folder / f"{record.run_id}.json")

    def finish(self, record: RunRecord, state: RunState) -> None:
        record.state = state
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.save(record)

    def newest_first(self, pipeline: str) -> Iterator[RunRecord]:
        """Records that can be read; a damaged one tells nothing and is passed over."""
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                record = RunRecord.model_validate_json(path.read_bytes())
            except (OSError, ValidationError):
                continue
            if record.pipeline == pipeline:
                yield record

    def get(self, pipeline: str, run_id: str | None) -> RunRecord:
        """The last run of a pipeline, or the named one. Raises ConfigError where there is none."""
        for record in self.newest_first(pipeline):
            if run_id in (None, record.run_id):
                return record
        what = f"run {run_id} of {pipeline}" if run_id else f"run of {pipeline}"
        raise ConfigError([Problem("--run" if run_id else "show", "", f"found no {what}", f"start one with `tuneline run {pipeline}`")])

    def last_success(self, pipeline: str, stages: set[str]) -> dict[str, StageRecord]:
        """By stage name: its newest record that ended with an artifact."""
        found: dict[str, StageRecord] = {}
        for record in self.newest_first(pipeline):
            for stage in record.stages:
                if stage.stage in stages and stage.document is not None and stage.status in ("done", "cached"):
                    found.setdefault(stage.stage, stage)
            if stages <= found.keys():
                break
        return found
