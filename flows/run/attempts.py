"""Classify how a program ended: its failure class, and what the next attempt does differently.

Failed attempts are kept in the work folder, so a halved micro-batch stays halved in later runs too. Unexplained deaths are
counted for each run separately.
"""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

from flows.run.supervisor import Outcome
from tuneline.errors import StageFailed, StageStopped
from tuneline.files import write_atomically
from tuneline.kinds.stage import ProgramStage
from tuneline.workspace.file_names import FAILURE, LOG
from tuneline.workspace.protocol import Failure

LOG_TAIL = 30  # lines of the log shown with an unexplained death


class Attempts:
    """Failed attempts at a key, oldest first."""

    def __init__(self, path: Path):
        self._path = path
        self.all: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):  # none yet, or cut short by a power failure: starts with an empty list
            self.all = json.loads(path.read_bytes())

    def of_run(self, run_id: str) -> list[dict[str, Any]]:
        return [attempt for attempt in self.all if attempt["run_id"] == run_id]

    def micro_batch(self, stage: ProgramStage) -> int | None:
        size = stage.micro_batch_size()
        for attempt in self.all:
            if attempt["class"] == "oom" and size is not None and attempt["micro_batch_size"] == size:
                size = stage.smaller_micro_batch(size) or size
        return size

    def failed(self, run_id: str, stage: ProgramStage, micro_batch: int | None, outcome: Outcome, work: Path) -> StageFailed:
        """Record the attempt and return its failure."""
        unexplained = any(attempt["unexplained"] for attempt in self.of_run(run_id))
        failure = _failure(stage, micro_batch, outcome, work, unexplained)
        explained = (work / FAILURE).exists() or _killed_for_memory(outcome) or outcome.stopped
        what = "cancelled" if isinstance(failure, StageStopped) else failure.failure_class
        entry = {"run_id": run_id, "class": what, "micro_batch_size": micro_batch, "unexplained": not explained}
        self.all.append(entry)
        write_atomically(self._path, json.dumps(self.all, indent=1))
        return failure


def _killed_for_memory(outcome: Outcome) -> bool:
    """Return whether the kernel's OOM killer ended the program.

    The count of the control group includes other stages, so the program, or one of its processes, must also have died by SIGKILL.
    """
    return outcome.oom_killed and outcome.status == 128 + signal.SIGKILL


def _failure(stage: ProgramStage, micro_batch: int | None, outcome: Outcome, work: Path, unexplained_before: bool) -> StageFailed:
    if outcome.stopped == "cancelled":
        return StageStopped()
    if outcome.stopped == "timeout":
        hint = "raise `timeout`, then run again: it resumes from its last checkpoint"
        return StageFailed("config", f"ended after its timeout of {stage.timeout} s", hint)
    known: Failure | None = Failure.read(work / FAILURE) if (work / FAILURE).exists() else None
    killed = _killed_for_memory(outcome)
    if killed or (known and known.failure_class == "oom"):
        what = known.message if known and not killed else "the kernel killed it because memory ran out"
        smaller = stage.smaller_micro_batch(micro_batch) if micro_batch else None
        hint = (
            f"retried with micro_batch_size {smaller}"
            if smaller
            else "the micro-batch cannot be smaller: use a smaller model or more memory"
        )
        return StageFailed("oom", what, hint, known.details if known else "", final=smaller is None)
    if known:
        return StageFailed(known.failure_class, known.message, known.hint, known.details)
    tail = "\n".join((work / LOG).read_text(errors="replace").splitlines()[-LOG_TAIL:])
    how = f"by signal {outcome.status - 128}" if outcome.status > 128 else f"with status {outcome.status}"
    message = f"the program ended {how} without saying why"
    if outcome.status < 0:
        message = f"the program's watchdog was ended by signal {-outcome.status}"
    if unexplained_before:
        return StageFailed("bug", f"{message}, twice; the end of its log:\n{tail}", f"the whole log: {work / LOG}", details=tail)
    return StageFailed("transient", message, "it is retried once, within `retries`", details=tail)
