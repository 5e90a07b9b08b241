"""A stage in the report of a run: its plan, how it ended, and the contents of its artifact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuneline.workspace.artifact import Manifest
from tuneline.workspace.file_names import MANIFEST, META
from tuneline.workspace.reference import REFERENCE
from tuneline.workspace.runs import PlannedStage, RunRecord, StageRecord


@dataclass
class Stage:
    """One stage of the run: its plan, how it ended, and its artifact, if that is still the one of this run."""

    plan: PlannedStage
    entry: StageRecord | None
    unended: str
    manifest: Manifest | None = None
    gone: str = ""

    def __post_init__(self) -> None:
        if self.entry and self.entry.artifact:
            try:
                manifest = Manifest.model_validate_json(Path(self.entry.artifact, MANIFEST).read_bytes())
            except (OSError, ValidationError):
                self.gone = "its artifact is no longer in the store"
                return
            if manifest.digest == self.entry.digest:
                self.manifest = manifest
            else:
                self.gone = "its artifact was built again since, with another digest"

    @property
    def name(self) -> str:
        return self.plan.stage

    @property
    def kind(self) -> str:
        return self.plan.kind

    @property
    def status(self) -> str:
        return self.entry.status if self.entry else self.unended

    @property
    def message(self) -> str:
        return self.entry.message if self.entry else ""

    @property
    def document(self) -> dict[str, Any]:
        return (self.entry.document if self.entry else None) or {}

    @property
    def metrics(self) -> dict[str, float]:
        return self.entry.metrics if self.entry else {}

    @property
    def seconds(self) -> float:
        """Return the seconds of all attempts in this run; for a cached stage, of its build (0 if unknown)."""
        if self.status == "cached" and self.manifest:
            host = self.manifest.host
            return between(host.get("started"), host.get("finished"))
        return self.entry.seconds if self.entry else 0.0

    @property
    def attempts(self) -> str:
        """Describe the attempts, or return an empty string if the first one succeeded."""
        if not (self.manifest and self.manifest.host.get("failed")):
            return str(self.entry.attempts) if self.entry and self.entry.attempts > 1 else ""
        host = self.manifest.host
        halved = f"; ended with micro-batches of {host['micro_batch_size']}" if "oom" in host["failed"] else ""
        return f"{host['attempts']}, failed before: {', '.join(host['failed'])}{halved}"

    @property
    def size(self) -> float:
        """Return the bytes of the artifact; for a model by reference, those of the folder that it points to."""
        by_reference = self.kind == "model" and self.manifest and any(file.path == REFERENCE for file in self.manifest.files)
        return self.metrics.get("bytes", 0.0) if by_reference else float(self.manifest.size) if self.manifest else 0.0

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the valid objects of a JSON lines file in meta/."""
        found = []
        for line in self.text(name).split("\n"):  # splitlines would also split at other separators inside strings
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in found if isinstance(line, dict)]

    def text(self, name: str) -> str:
        if not (self.manifest and self.entry and self.entry.artifact):
            return ""
        try:
            return Path(self.entry.artifact, META, name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def stages_of(record: RunRecord) -> dict[str, Stage]:
    """Return the stages by name, in execution order."""
    entries = {entry.stage: entry for entry in record.stages}
    planned = record.planned or [PlannedStage(stage=entry.stage, kind=entry.kind) for entry in record.stages]
    unended = "pending" if record.state == "running" else "not run"
    return {plan.stage: Stage(plan, entries.get(plan.stage), unended) for plan in planned}


def between(started: Any, finished: Any) -> float:
    """Return the seconds between two times; 0 if one is missing or the clock was set back."""
    if not (started and finished):
        return 0.0
    return max(0.0, (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds())
