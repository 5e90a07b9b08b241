"""`tuneline logs`: print the logs of a run's stages, or follow them until the run ends.

A stage's log is in its work folder while it is built, and in its artifact once that is published. All attempts append to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tuneline.errors import ConfigError, Problem
from tuneline.wording import nearest
from tuneline.workspace.file_names import LOG, META
from tuneline.workspace.runs import RunRecord, StageRecord
from tuneline.workspace.workspace import Workspace

POLL_SECONDS = 0.3


def print_logs(workspace: Workspace, record: RunRecord, stage: str, tail: int | None, write: Callable[[str], object]) -> bool:
    """Write the log of each stage, or only of `stage`, under a line that names it. Returns whether there was a log."""
    found = False
    for entry in entries(record, stage):
        if file := log_of(workspace, entry):
            found = True
            write(f"==> {entry.stage} ({entry.status}): {os.path.relpath(file)}")
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines[-tail:] if tail else lines:
                write(shown(line))
    return found


def follow(workspace: Workspace, record: RunRecord, stage: str, tail: int | None, write: Callable[[str], object]) -> RunRecord:
    """Write new lines, each prefixed with its stage, until the run, or the stage, has ended. Returns the final record."""
    logs: dict[str, Followed] = {}
    with ExitStack() as files:
        while True:
            record = workspace.runs.get(record.pipeline, record.run_id)
            chosen = entries(record, stage)
            ended = record.state != "running" or bool(stage and chosen and chosen[0].status != "running")
            for entry in chosen:
                if entry.stage not in logs and entry.status != "cached" and (file := log_of(workspace, entry)):
                    logs[entry.stage] = Followed(files.enter_context(file.open("rb")), tail)
            for name, log in logs.items():
                for line in log.new(ended):
                    write(f"{name}: {shown(line)}")
            if ended:
                return record
            time.sleep(POLL_SECONDS)


@dataclass
class Followed:
    """An open log file. Its folder may be renamed meanwhile, which happens at the publication of an artifact."""

    file: BinaryIO
    tail: int | None
    _begun: bool = False
    _rest: bytes = b""

    def new(self, ended: bool) -> Iterator[str]:
        """Yield the whole lines since the last call, the first time only the last `tail`. Once `ended`, include an unfinished last line."""
        *lines, self._rest = (self._rest + self.file.read()).split(b"\n")
        if ended and self._rest:
            lines.append(self._rest)
        if not self._begun and self.tail:
            lines = lines[-self.tail :]
        self._begun = True
        yield from (line.decode(errors="replace") for line in lines)


def check_stage(record: RunRecord, stage: str) -> None:
    """Raises ConfigError if the run has no such stage."""
    known = _order(record)
    if stage and stage not in known:
        found = f"found no stage `{stage}` in run {record.run_id}, expected {', '.join(known) or 'none'}"
        raise ConfigError([Problem("", found, nearest(stage, known), place="logs")])


def entries(record: RunRecord, stage: str) -> list[StageRecord]:
    """Return the stages that have started, in the order of the plan, or only `stage`."""
    order = _order(record)
    return sorted((each for each in record.stages if stage in ("", each.stage)), key=lambda each: order.index(each.stage))


def _order(record: RunRecord) -> list[str]:
    return [each.stage for each in record.planned] or [each.stage for each in record.stages]


def log_of(workspace: Workspace, entry: StageRecord) -> Path | None:
    """Return the stage's log file, or None for a gate, a skipped stage, or one whose files are gone."""
    if entry.key is None:
        return None
    folders = [workspace.store.folder(entry.kind, entry.key) / META, workspace.work(entry.key)]
    files = [folder / LOG for folder in (folders if entry.status in ("done", "cached") else reversed(folders))]
    return next((file for file in files if file.is_file()), None)


def shown(line: str) -> str:
    """Return the line as a terminal shows it: of a progress bar, which is redrawn after carriage returns, the last state."""
    return line.rstrip().rpartition("\r")[2]
