"""`tuneline logs`: what the programs of a run have written, stage by stage; with `follow`, until the run ends.

A stage's log lies in its work folder while it is worked on, and in its artifact once that is published. Attempts are appended.
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
from tuneline.workspace.runs import RunRecord, StageRecord
from tuneline.workspace.workspace import Workspace

POLL_SECONDS = 0.3


def print_logs(workspace: Workspace, record: RunRecord, stage: str, tail: int | None, write: Callable[[str], object]) -> bool:
    """Writes the log of each stage of the record, or of `stage` alone, under a line that names it. Returns whether there was one."""
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
    """Writes lines as they come, each after the name of its stage. Returns the record as it is when the run, or the stage, has ended."""
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
    """An open log; a folder that is renamed, as at the publication of an artifact, does not matter to it."""

    file: BinaryIO
    tail: int | None
    _begun: bool = False
    _rest: bytes = b""

    def new(self, ended: bool) -> Iterator[str]:
        """Whole lines since the last look, at the first one the last `tail`; once it has `ended`, what stands after the last line, too."""
        *lines, self._rest = (self._rest + self.file.read()).split(b"\n")
        if ended and self._rest:
            lines.append(self._rest)
        if not self._begun and self.tail:
            lines = lines[-self.tail :]
        self._begun = True
        yield from (line.decode(errors="replace") for line in lines)


def check_stage(record: RunRecord, stage: str) -> None:
    """Raises ConfigError for a stage that the run does not have."""
    known = _order(record)
    if stage and stage not in known:
        found = f"found no stage `{stage}` in run {record.run_id}, expected {', '.join(known) or 'none'}"
        raise ConfigError([Problem("", found, nearest(stage, known), place="logs")])


def entries(record: RunRecord, stage: str) -> list[StageRecord]:
    """The stages that have begun, in the order of the plan; with `stage`, that one alone."""
    order = _order(record)
    return sorted((each for each in record.stages if stage in ("", each.stage)), key=lambda each: order.index(each.stage))


def _order(record: RunRecord) -> list[str]:
    return [each.stage for each in record.planned] or [each.stage for each in record.stages]


def log_of(workspace: Workspace, entry: StageRecord) -> Path | None:
    """None where the stage has none: a gate, a stage that was skipped, or one whose files are gone."""
    if entry.key is None:
        return None
    folders = [workspace.store.folder(entry.kind, entry.key) / "meta", workspace.work(entry.key)]
    files = [folder / "log.txt" for folder in (folders if entry.status in ("done", "cached") else reversed(folders))]
    return next((file for file in files if file.is_file()), None)


def shown(line: str) -> str:
    """The line as a terminal would leave it: of a progress bar, drawn again and again after a carriage return, its last state."""
    return line.rstrip().rpartition("\r")[2]
