"""How the running stages of a stopped run ended: at the last write of their program, with its last step.

No process was left to record it, so it is read from their work folders.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tuneline.workspace.file_names import EVENTS
from tuneline.workspace.protocol import Event

if TYPE_CHECKING:
    from tuneline.workspace.runs import RunRecord


def end_stages(record: RunRecord, work: Path) -> None:
    """End the running stages of a record. `work`: the parent folder of work folders."""
    for stage in record.stages:
        if stage.status == "running":
            folder = work / (stage.key or "")
            began = datetime.fromisoformat(stage.started).timestamp() if stage.started else 0.0
            stage.run_until(min(datetime.now(UTC), _last_written(folder)))
            stage.status, stage.message = "cancelled" if record.state == "cancelled" else "killed", _reached(folder, began)
            stage.started = None


def _last_written(folder: Path) -> datetime:
    """Return the mtime of a folder's newest file; 1970 if there is none."""
    times = [0.0]
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            times.append(file.stat().st_mtime)
    return datetime.fromtimestamp(max(times), UTC)


def _reached(folder: Path, since: float) -> str:
    """Return the last step of a program's last attempt as text, or nothing."""
    with contextlib.suppress(OSError):
        for line in reversed((folder / EVENTS).read_bytes().splitlines()):
            with contextlib.suppress(ValidationError):  # a line cut off by a kill
                event = Event.model_validate_json(line)
                if event.t < since:
                    break
                if event.type == "progress":
                    return f"reached step {event.step} of {event.total}"
    return ""
