"""End a run that is cancelled on the server.

Each flow polls its own state on the server. If the run is cancelled there (by `prefect flow-run cancel` or in the UI) or deleted,
the flow stops its programs and ends as cancelled. A worker also sends a signal to the runs that it started. Whichever arrives first,
the poll or the signal, ends the run. Prefect passes the cancelling of a flow to no subflow, so a run also polls the flows that call it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from flows.run.supervisor import Supervisor

POLL_SECONDS = 3.0  # between two polls of the state on the server


class Watch:
    """Poll the state of a run on the server, and stop the programs of this process once it is cancelled or deleted there.

    `of_parent`: `run` is the parent of this run, which stops once the parent has ended in any state. The server learns minutes later that a
    parent was killed together with its worker, so `alive`, if given, is called as well. `callers`: flows that call this run.
    """

    def __init__(
        self,
        run: UUID,
        supervisor: Supervisor,
        of_parent: bool = False,
        alive: Callable[[], bool] | None = None,
        callers: Sequence[UUID] = (),
    ):
        self.why = ""
        self._runs = {run: "it"} | dict.fromkeys(callers, "a flow that calls it")
        self._supervisor, self._of_parent = supervisor, of_parent
        self._alive = alive
        self._ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _look(self) -> None:
        from prefect.client.orchestration import get_client

        while not self._ended.is_set():
            with suppress(Exception), get_client(sync_client=True) as client:  # whatever an unreachable server raises
                while not self._ended.wait(POLL_SECONDS):
                    if why := self._killed() or next(filter(None, (self._over(client, *run) for run in self._runs.items())), ""):
                        self.why = why
                        self._supervisor.stop()
                        return
            self._ended.wait(POLL_SECONDS)

    def _killed(self) -> str:
        return "its process is gone" if self._alive is not None and not self._alive() else ""

    def _over(self, client: Any, run: UUID, name: str) -> str:
        from prefect.exceptions import ObjectNotFound

        try:
            state = client.read_flow_run(run).state
        except ObjectNotFound:
            return f"{name} was deleted on the server"
        if state is None:
            return ""
        over = state.is_cancelling() or state.is_cancelled() or (self._of_parent and state.is_final())
        return (state.message or f"{name} was cancelled on the server") if over else ""


def callers() -> list[UUID]:
    """Return the flow that calls this one as a subflow, and the first of the flows that called it; none for a run of its own."""
    import httpx
    from prefect.context import FlowRunContext
    from prefect.exceptions import ObjectNotFound
    from prefect.runtime import flow_run

    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.parent_task_run_id is None:
        return []  # asks no server, which could be down
    try:
        return [UUID(str(run)) for run in dict.fromkeys([flow_run.parent_flow_run_id, flow_run.root_flow_run_id]) if run]
    except (ObjectNotFound, httpx.HTTPError):
        return []
