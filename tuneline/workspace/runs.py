"""Run records: one JSON file per run, rewritten whenever a stage ends, so that the record of a killed run is nearly complete.

    <run>.json    the record          <run>.lock    an flock, held while the run is alive: the kernel frees it when its process dies

A record with the state `running` whose lock is free belongs to a killed run. It is read as `killed`, and the next run writes
that state. Its running stages were killed too; their end is the last change of their work folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneline.config.order import in_order, with_ancestors
from tuneline.config.spec import Pipeline
from tuneline.errors import ConfigError, Problem, StoreError
from tuneline.files import open_lock, try_lock, write_atomically
from tuneline.kinds.fields import Reference, annotated_values
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.stage_ends import end_stages

SCHEMA = 5  # 2: planned stages; 3: run in Prefect; 4: running stages, attempts; 5: cancelled stages. Older schemas can be read.
BALLAST = 4 << 20  # bytes reserved in a run's lock file, freed to write the final record when the disk is full
StageStatus = Literal["running", "done", "cached", "failed", "skipped", "refused", "cancelled", "killed"]
RunState = Literal["running", "completed", "failed", "refused", "cancelled", "killed"]


class StageRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stage: str
    kind: str
    status: StageStatus
    key: str | None = None
    digest: str | None = None
    document: dict[str, Any] | None = None
    """The document that the key is the hash of; later plans compare with it."""
    artifact: str | None = None
    started: str | None = None
    """Start of the current attempt; only while the stage is running and does not wait for a retry."""
    attempts: int = 0
    """Number of attempts in this run."""
    seconds: float = 0.0
    """Duration of all attempts of this run, without waiting times."""
    metrics: dict[str, float] = {}
    message: str = ""

    def run_until(self, moment: datetime) -> None:
        """Add the time from the start of the current attempt to its seconds. A stage that waits for a retry is not in an attempt."""
        if self.status == "running" and self.started is not None:
            self.seconds += max(0.0, round((moment - datetime.fromisoformat(self.started)).total_seconds(), 1))
            self.started = moment.isoformat()

    def name_artifact(self, artifact: Artifact, metrics: dict[str, float]) -> None:
        """Note which artifact the stage ended with. `metrics`: its figures, under the names of this pipeline's stages."""
        manifest = artifact.manifest
        self.key, self.digest, self.document = manifest.key, manifest.digest, manifest.document
        self.artifact, self.metrics = str(artifact.path), metrics


class PlannedStage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stage: str
    kind: str
    names: dict[str, str] = {}
    """Referenced stages by field. They draw the graph of a run even if pipelines.yaml has changed since."""


def planned(pipeline: Pipeline, only: str | None) -> list[PlannedStage]:
    """Return the planned stages of a run record: the whole pipeline, or a stage and its ancestors."""
    wanted = with_ancestors(pipeline, only) if only else set(pipeline.stages)
    stages = ((name, pipeline.stages[name]) for name in in_order(pipeline) if name in wanted)
    return [
        PlannedStage(stage=name, kind=stage.kind, names={field: target for field, _, target in annotated_values(stage, Reference)})
        for name, stage in stages
    ]


class RunRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")
    run_id: str
    flow_run: str | None = None
    """Id of the run in Prefect."""
    pipeline: str
    overrides: tuple[str, ...] = ()
    only: str | None = None
    force: tuple[str, ...] = ()
    planned: list[PlannedStage] = []
    """In execution order."""
    started: str
    finished: str | None = None
    state: RunState = "running"
    stages: list[StageRecord] = []


class Runs:
    def __init__(self, folder: Path):
        self.folder = folder
        self._locks: dict[str, int] = {}  # lock descriptors of the runs of this process
        self._ended: dict[str, tuple[int, list[StageRecord]]] = {}  # killed runs: mtime of the record, and its stages as they ended

    def begin(self, pipeline: str, overrides: tuple[str, ...]) -> RunRecord:
        """Create and save the record of a new run, which is alive until `finish` or the end of this process."""
        self._settle()
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}Z-{secrets.token_hex(2)}"  # in the order of their starts
        self.folder.mkdir(parents=True, exist_ok=True)
        unlocked = self.folder / f".{run_id}.new"
        self._locks[run_id] = open_lock(unlocked)
        try_lock(self._locks[run_id])
        with contextlib.suppress(OSError):
            os.posix_fallocate(self._locks[run_id], 0, BALLAST)
        unlocked.rename(self._lock(run_id))  # so that no other process sees the lock free while we are alive
        record = RunRecord(run_id=run_id, pipeline=pipeline, overrides=overrides, started=now.isoformat(timespec="seconds"))
        self.save(record)
        return record

    def save(self, record: RunRecord) -> None:
        try:
            self._write(record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or record.run_id not in self._locks:
                raise
            os.ftruncate(self._locks[record.run_id], 0)
            self._write(record)

    def _write(self, record: RunRecord) -> None:
        write_atomically(self.folder / f"{record.run_id}.json", record.model_dump_json(by_alias=True, indent=1))

    def finish(self, record: RunRecord, state: RunState) -> None:
        record.state = state
        end_stages(record, self.folder.parent / "work")
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.save(record)
        self._lock(record.run_id).unlink(missing_ok=True)
        if record.run_id in self._locks:
            os.close(self._locks.pop(record.run_id))

    def alive(self, record: RunRecord) -> bool:
        """Return whether the run of a record has neither ended nor been killed."""
        return record.state == "running" and _held(self._lock(record.run_id))

    def process(self, record: RunRecord) -> int | None:
        """Return the process id of a run; None if it has ended, or runs on another machine or as another user."""
        lock = str(self._lock(record.run_id).resolve())
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
                if folder.name.isdecimal() and any(os.readlink(link) == lock for link in (folder / "fd").iterdir()):
                    return int(folder.name)
        return None

    def files(self, record: RunRecord) -> list[Path]:
        """Return the existing files of a run: report, lock and, last, the record itself."""
        return [file for end in ("html", "lock", "json") if (file := self.folder / f"{record.run_id}.{end}").is_file()]

    def remove(self, record: RunRecord) -> None:
        for file in self.files(record):
            file.unlink(missing_ok=True)

    def _lock(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.lock"

    def _settle(self) -> None:
        """Write the final state of killed runs."""
        for lock in self.folder.glob("*.lock"):
            if not _held(lock):
                with contextlib.suppress(OSError, ValidationError):
                    record = self._read(lock.with_suffix(".json"))
                    if record.state == "killed":
                        self.save(record)
                lock.unlink(missing_ok=True)

    def _read(self, path: Path) -> RunRecord:
        """Read a record. Raises OSError or ValidationError."""
        record = RunRecord.model_validate_json(path.read_bytes())
        if record.state == "running" and not self.alive(record):
            record = RunRecord.model_validate_json(path.read_bytes())  # it may have ended since
            if record.state == "running":
                record.state = "killed"
        if record.state == "running":
            for stage in record.stages:
                stage.run_until(datetime.now(UTC))
        elif any(stage.status == "running" for stage in record.stages):
            version = path.stat().st_mtime_ns
            if self._ended.get(record.run_id, (0, []))[0] != version:
                end_stages(record, self.folder.parent / "work")
                self._ended[record.run_id] = version, record.stages
            record.stages = [stage.model_copy() for stage in self._ended[record.run_id][1]]
        return record

    def read(self, run_id: str) -> RunRecord | None:
        """Return the record of a run, or None if there is none that can be read."""
        if run_id != Path(run_id).name:  # as from a command line
            return None
        with contextlib.suppress(OSError, ValidationError):
            return self._read(self.folder / f"{run_id}.json")
        return None

    def newest_first(self, pipeline: str | None = None) -> Iterator[RunRecord]:
        """Yield records of the pipeline, or of all pipelines. Skips records that cannot be read."""
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                record = self._read(path)
            except (OSError, ValidationError):
                continue
            if pipeline in (None, record.pipeline):
                yield record

    def every(self) -> list[RunRecord]:
        """Return all records, newest first. Raises StoreError if one cannot be read, because what it needs is then unknown."""
        found = []
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                found.append(self._read(path))
            except FileNotFoundError:  # deleted meanwhile
                continue
            except (OSError, ValidationError) as error:
                message = f"the run record {path} cannot be read: what that run needs is unknown"
                hint = "delete the file if the run is no longer needed, or upgrade tuneline if a newer version wrote it"
                raise StoreError(message, hint) from error
        return found

    def get(self, pipeline: str, run_id: str | None) -> RunRecord:
        """Return the last run of a pipeline, or the named one. Raises ConfigError if there is none."""
        record = self.read(run_id) if run_id else next(self.newest_first(pipeline), None)
        if record and record.pipeline == pipeline:
            return record
        where, what = ("--run", f"run {run_id} of {pipeline}") if run_id else (pipeline, "run of it yet")
        raise ConfigError([Problem("", f"found no {what}", f"start one with `tuneline run {pipeline}`", place=where)])

    def run_that_forced(self, pipeline: str, stage: str, key: str, flow_run: str | None = None) -> str | None:
        """Return the id of the run whose `--force` has rebuilt this key already, or None. Counts only if every later run was
        stopped, or if Prefect retries that run (`flow_run`)."""
        stopped = True  # all newer runs were stopped
        for record in self.newest_first(pipeline):
            same = flow_run is not None and record.flow_run == flow_run
            if ((stopped and record.state in ("killed", "cancelled")) or same) and stage in record.force:
                built = (entry for entry in record.stages if entry.stage == stage and entry.key == key)
                if any(entry.status == "done" for entry in built):
                    return record.run_id
            stopped = stopped and record.state in ("killed", "cancelled", "running")
        return None

    def last_success(self, pipeline: str, stages: set[str]) -> dict[str, StageRecord]:
        """Return the newest record with an artifact of each stage, by name."""
        found: dict[str, StageRecord] = {}
        for record in self.newest_first(pipeline):
            for stage in record.stages:
                if stage.stage in stages and stage.document is not None and stage.status in ("done", "cached"):
                    found.setdefault(stage.stage, stage)
            if stages <= found.keys():
                break
        return found


def _held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)
