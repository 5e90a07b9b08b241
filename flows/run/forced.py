"""Make a `--force` rebuild a stage once: it starts from scratch, but resumes what the same force has begun.

    <work>/forced.json   the Prefect run that began, and whether it has failed since; removed with the folder at publication

A run that was killed or cancelled and is called again, or that Prefect retries, is the same force: it resumes. A run that failed and is
called again is a new force: it starts at step 0. `tuneline.workspace.runs.Runs.run_that_forced` finds what a force has built already.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from tuneline.files import write_atomically
from tuneline.workspace.runs import RunRecord


def begin(work: Path, record: RunRecord, tried: bool) -> None:
    """Empty the work folder, unless this force has begun in it. `tried`: this run has attempted the stage before."""
    began = _read(work)
    same = record.flow_run is not None and began.get("flow_run") == record.flow_run
    if not tried and not same and began.get("failed", True):
        shutil.rmtree(work, ignore_errors=True)
    _write(work, {"flow_run": record.flow_run, "failed": False})


def failed(work: Path) -> None:
    """Note that the forced stage has failed, so that the next force starts at step 0. Does nothing if it was not forced."""
    if began := _read(work):
        _write(work, {**began, "failed": True})


def _read(work: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):  # not forced, or cut short by a kill
        return dict(json.loads((work / "forced.json").read_bytes()))
    return {}


def _write(work: Path, content: dict[str, object]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "forced.json", json.dumps(content))
