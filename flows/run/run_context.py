"""What the stages of one run share, and who watches it."""

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
from tuneline.workspace.protocol import Event
from tuneline.workspace.runs import RunRecord, StageRecord, StageStatus
from tuneline.workspace.workspace import Workspace


class Reporter(Protocol):
    """Who watches a run: the terminal, or nobody."""

    def began(self, run_id: str, page: str | None) -> None: ...
    def started(self, stage: str, message: str) -> None: ...
    def progress(self, stage: str, event: Event) -> None: ...
    def line(self, stage: str, line: str) -> None: ...
    def warning(self, stage: str, message: str) -> None: ...
    def finished(self, stage: str, record: StageRecord) -> None: ...
    def interrupted(self, error: BaseException) -> None: ...


@dataclass(frozen=True)
class NoReporter:
    """Under a worker nobody looks at a terminal; Prefect has the log."""

    def began(self, run_id: str, page: str | None) -> None: ...
    def started(self, stage: str, message: str) -> None: ...
    def progress(self, stage: str, event: Event) -> None: ...
    def line(self, stage: str, line: str) -> None: ...
    def warning(self, stage: str, message: str) -> None: ...
    def finished(self, stage: str, record: StageRecord) -> None: ...
    def interrupted(self, error: BaseException) -> None: ...


@dataclass
class RunContext:
    """What the stages of one run share."""

    workspace: Workspace
    pipeline: str
    record: RunRecord
    supervisor: Supervisor
    slots: Slots
    reporter: Reporter
    publisher: Publisher
    forced: frozenset[str] = frozenset()
    parameters: dict[str, Any] | None = None
    """What the flow was called with, where it runs in a pool: then stages with a pool of their own run there."""
    child_of: str | None = None
    """In a child: the key that its parent asked for. The run's record is the parent's."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Of the stages that gave an artifact: what gates look at."""
    attempts: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each attempt at a stage that has ended."""
    keys: dict[str, str] = field(default_factory=dict)
    """Of the stages that came to have one: what a failed one left is under it in the work folder."""
    _commits: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _commits_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stages(self) -> Mapping[str, Stage]:
        return self.workspace.loaded.spec.pipelines[self.pipeline].stages

    def commit(self, repository_type: str, repository: str, revision: str) -> str:
        """The same commit for every stage of the run."""
        with self._commits_lock:
            wanted = (repository_type, repository, revision)
            if wanted not in self._commits:
                self._commits[wanted] = resolve_commit(*wanted)
            return self._commits[wanted]

    def resolve(self, stage: ProgramStage) -> ResolvedInputs:
        """Raises ConfigError, and StageFailed where the hub does not say a commit."""
        try:
            return resolve(self.workspace, stage, self.commit)
        finally:
            self.workspace.memory.save()

    def know_commits(self, commits: list[list[str]]) -> None:
        """Of a parent: [repository type, repository, revision, commit]."""
        self._commits |= {(kind, repository, revision): commit for kind, repository, revision, commit in commits}

    @contextmanager
    def attempt(self, name: str, key: str) -> Iterator[None]:
        """While a stage's program works: what it waited for before is not its time. The record says so, should the run be killed."""
        began, earlier = time.monotonic(), self.attempts.setdefault(name, [])
        record = StageRecord(stage=name, kind=self.stages[name].kind, status="running", key=key, started=datetime.now(UTC).isoformat())
        record.attempts, record.seconds = len(earlier) + 1, round(sum(earlier), 1)
        self._keep(record)
        try:
            yield
        finally:
            earlier.append(time.monotonic() - began)

    def _keep(self, record: StageRecord) -> None:
        with self._lock:
            self.record.stages = [other for other in self.record.stages if other.stage != record.stage] + [record]
            if self.child_of is None:
                self.workspace.runs.save(self.record)

    def warn(self, name: str, message: str) -> None:
        get_run_logger().warning(message)
        self.reporter.warning(name, message)

    def note(self, name: str, status: StageStatus, artifact: Artifact | None = None, message: str = "") -> None:
        """Keeps how a stage ended, in the record on disk as well."""
        stage, attempts = self.stages[name], self.attempts.get(name, [])
        record = StageRecord(stage=name, kind=stage.kind, status=status, key=self.keys.get(name), message=message)
        record.attempts, record.seconds = len(attempts), round(sum(attempts), 1)
        if artifact:
            manifest = artifact.manifest
            record.key, record.digest, record.document = manifest.key, manifest.digest, manifest.document
            record.artifact, record.metrics = str(artifact.path), shown_metrics(stage, manifest.metrics)
            self.manifests[name] = manifest
        self._keep(record)
        self.reporter.finished(name, record)
        if status != "skipped":
            planned = next(plan for plan in self.record.planned if plan.stage == name)
            log = self.workspace.work(self.keys[name]) / "log.txt" if status == "failed" and name in self.keys else None
            about = stage.description or f"{name}, {stage.kind} of {self.pipeline}: {status}"
            self.publisher.markdown(f"stage-{self.pipeline}-{name}", lambda: stage_report(planned, record, log), about)
