"""Report the end of runs that could not report it: they were killed, or ended while the server was away, and would stay Running there.

The keeper of `tuneline up` calls it. A run counts as killed only if this process has seen its lock held before: on a file system whose
locks do not work between machines, a run of another machine is never seen alive. `tuneline doctor --fix` handles all other cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from flows.server import api
from tuneline.workspace.runs import RunRecord, Runs

SETTLED = 60.0  # seconds in which a run that has ended in order reports its end, or its worker does
KILLED = 8.0  # and in which a worker reports that its run was killed
STATES = {"completed": "COMPLETED", "failed": "FAILED", "refused": "FAILED", "cancelled": "CANCELLED", "killed": "CRASHED"}


class Unreported:
    """The runs that this process has seen alive, and when it first saw that they were not."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._ended: dict[str, float | None] = {}

    def look(self, address: str, say: Callable[[str], object]) -> None:
        """Never waits for a run; where the server does not answer, the next call asks again."""
        for lock in self._runs.folder.glob("*.lock"):
            if (record := self._record(lock.stem)) and self._runs.alive(record):
                self._ended.setdefault(lock.stem, None)
        now = time.monotonic()
        for run_id, since in list(self._ended.items()):
            record = self._record(run_id)
            if record is None or (record.flow_run is None and record.state != "running"):
                del self._ended[run_id]
            elif record.state == "running":
                continue
            elif since is None:
                self._ended[run_id] = now
            elif now - since > (KILLED if record.state == "killed" else SETTLED):
                with suppress(OSError, ValueError):
                    if not self._retried(record):
                        _report(address, record, say)
                    del self._ended[run_id]

    def _retried(self, record: RunRecord) -> bool:
        """Return whether Prefect runs the same flow run again: then the server has its state."""
        return any(other.flow_run == record.flow_run and other.started > record.started for other in self._runs.newest_first())

    def _record(self, run_id: str) -> RunRecord | None:
        return self._runs.read(run_id)


def _report(address: str, record: RunRecord, say: Callable[[str], object]) -> None:
    """Raises OSError, ValueError where the server does not answer."""
    # A worker reports a run as crashed whose process could not report its end.
    types = ["RUNNING", "CANCELLING", *([] if record.state == "killed" else ["CRASHED"])]
    unended = {"id": {"any_": [record.flow_run]}, "state": {"type": {"any_": types}}}
    runs = api.ask(f"{address}/flow_runs/filter", {"flow_runs": unended})
    if not runs:
        return  # the server knows its end, or the run was deleted there
    name = "Refused" if record.state == "refused" else STATES[record.state].capitalize()
    message = f"its process is gone; its record {record.run_id} has the state {record.state}"
    state = {"type": STATES[record.state], "name": name, "message": message}
    api.ask(f"{address}/flow_runs/{record.flow_run}/set_state", {"state": state, "force": True})
    say(f"run {record.run_id} had not reported its end; it is {name} on the server now")
