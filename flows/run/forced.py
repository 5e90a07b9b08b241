"""`--force` is paid once: a stage that is forced begins without what earlier runs left of it, but goes on with what this force began.

    <work>/forced.json   the run in Prefect that began, and whether it failed since; gone with the folder once the artifact is published

A run that is killed or cancelled and called again, or tried again by Prefect (Retry), is the same force: it resumes. One that failed
and is called again is another: it begins at step 0. What a force has built already, `tuneline.workspace.runs.Runs.paid` knows.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from tuneline.workspace.runs import RunRecord


def begin(work: Path, record: RunRecord, tried: bool) -> None:
    """Empties the work folder, unless this force has begun in it. `tried`: this run has tried the stage before."""
    began = _read(work)
    same = record.flow_run is not None and began.get("flow_run") == record.flow_run
    if not tried and not same and began.get("failed", True):
        shutil.rmtree(work, ignore_errors=True)
    _write(work, {"flow_run": record.flow_run, "failed": False})


def failed(work: Path) -> None:
    """The stage has failed: who forces it again wants it from step 0. Nothing to note where it was not forced."""
    if began := _read(work):
        _write(work, {**began, "failed": True})


def _read(work: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):  # not forced, or torn by a kill
        return dict(json.loads((work / "forced.json").read_bytes()))
    return {}


def _write(work: Path, content: dict[str, object]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / ".forced.json"
    temporary.write_text(json.dumps(content))
    temporary.replace(work / "forced.json")
