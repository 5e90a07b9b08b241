"""The state that the stages of one run share, and the interface of its reporter."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from prefect import get_run_logger

from flows.report.artifacts import Publisher
from flows.report.markdown import stage_report
from flows.run.hub import resolve_commit
from flows.run.slots import Slots
from flows.run.supervisor import Supervisor
from tuneline.kinds.stage import ProgramStage, Stage
from tuneline.planning.inputs import ResolvedInputs, resolve
from tuneline.planning.verdict import shown_metrics
from tuneline.workspace.artifact import Artifact, Manifest
from tuneline.workspace.file_names import LOG
from tuneline.workspace.protocol import Event
from tuneline.workspace.runs import RunRecord, RunState, StageRecord, StageStatus
from tuneline.workspace.workspace import Workspace


class Reporter(Protocol):
    """Receives the events of a run: the terminal, or nothing."""

    def began(self, run_id: str, page: str | None) -> None: ...
    def started(self, stage: str, message: str) -> None: ...
    def progress(self, stage: str, event: Event) -> None: ...
    def line(self, stage: str, line: str) -> None: ...
    def warning(self, stage: str, message: str) -> None: ...
    def finished(self, stage: str, record: StageRecord) -> None: ...
    def interrupted(self, error: BaseException) -> None: ...


class NoReporter:
    """Ignores all events: under a worker there is no terminal, and Prefect has the log."""

    def began(self, run_id: str, page: str | None) -> None: ...
    def started(self, stage: str, message: str) -> None: ...
    def progress(self, stage: str, event: Event) -> None: ...
    def line(self, stage: str, line: str) -> None: ...
    def warning(self, stage: str, message: str) -> None: ...
    def finished(self, stage: str, record: StageRecord) -> None: ...
    def interrupted(self, error: BaseException) -> None: ...


@dataclass
class RunContext:
    """The state that the stages of one run share."""

    workspace: Workspace
    pipeline: str
    record: RunRecord
    supervisor: Supervisor
    slots: Slots
    reporter: Reporter
    publisher: Publisher
    forced: frozenset[str] = frozenset()
    parameters: dict[str, Any] | None = None
    """The flow's parameters if it runs in a pool: then stages with another pool run there. None otherwise."""
    child_of: str | None = None
    """In a child run: the key that its parent asked for. The parent keeps the run's record."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Manifests of the stages with an artifact, which gates read."""
    attempts: dict[str, list[float]] = field(default_factory=dict)
    """Durations of the ended attempts of each stage, in seconds."""
    keys: dict[str, str] = field(default_factory=dict)
    """Keys of the stages that have one, which also name their work folders."""
    _commits: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _commits_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stages(self) -> Mapping[str, Stage]:
        return self.workspace.loaded.spec.pipelines[self.pipeline].stages

    def commit(self, repository_type: str, repository: str, revision: str) -> str:
        """Return the commit of a revision, the same one for every stage of the run."""
        with self._commits_lock:
            wanted = (repository_type, repository, revision)
            if wanted not in self._commits:
                self._commits[wanted] = resolve_commit(*wanted)
            return self._commits[wanted]

    def resolve(self, stage: ProgramStage) -> ResolvedInputs:
        """Resolve the stage's outside inputs. Raises ConfigError, and StageFailed if the hub does not give a commit."""
        try:
            return resolve(self.workspace, stage, self.commit)
        finally:
            self.workspace.memory.save()

    def know_commits(self, commits: list[list[str]]) -> None:
        """Take over the commits of the parent: [repository type, repository, revision, commit]."""
        self._commits |= {(kind, repository, revision): commit for kind, repository, revision, commit in commits}

    @contextmanager
    def attempt(self, name: str, key: str) -> Iterator[None]:
        """Time an attempt, without the waiting before it, and keep it in the record on disk in case the run is killed."""
        began, earlier = time.monotonic(), self.attempts.setdefault(name, [])
        record = StageRecord(stage=name, kind=self.stages[name].kind, status="running", key=key, started=datetime.now(UTC).isoformat())
        record.attempts, record.seconds = len(earlier) + 1, round(sum(earlier), 1)
        self._keep(record)
        failed = True
        try:
            yield
            failed = False
        finally:
            earlier.append(time.monotonic() - began)
            if failed:  # the stage waits for a retry, which is no running time, or its end is recorded next
                self._keep(record.model_copy(update={"started": None, "seconds": round(sum(earlier), 1)}))

    def _keep(self, record: StageRecord) -> None:
        with self._lock:
            self.record.stages = [other for other in self.record.stages if other.stage != record.stage] + [record]
            if self.child_of is None:
                self.workspace.runs.save(self.record)

    def finish(self, state: RunState) -> None:
        """Record the end of the run. Stages that end at the same moment save the record as well."""
        with self._lock:
            self.workspace.runs.finish(self.record, state)

    def warn(self, name: str, message: str) -> None:
        get_run_logger().warning(message)
        self.reporter.warning(name, message)

    def note(self, name: str, status: StageStatus, artifact: Artifact | None = None, message: str = "") -> None:
        """Record how a stage ended, report it, and publish the stage's report."""
        stage, attempts = self.stages[name], self.attempts.get(name, [])
        record = StageRecord(stage=name, kind=stage.kind, status=status, key=self.keys.get(name), message=message)
        record.attempts, record.seconds = len(attempts), round(sum(attempts), 1)
        if artifact:
            record.name_artifact(artifact, shown_metrics(stage, artifact.manifest.metrics))
            self.manifests[name] = artifact.manifest
        self._keep(record)
        self.reporter.finished(name, record)
        if status != "skipped":
            planned = next(plan for plan in self.record.planned if plan.stage == name)
            log = self.workspace.work(self.keys[name]) / LOG if status == "failed" and name in self.keys else None
            about = stage.description or f"{name}, {stage.kind} of {self.pipeline}: {status}"
            self.publisher.markdown(f"stage-{self.pipeline}-{name}", lambda: stage_report(planned, record, log), about)
