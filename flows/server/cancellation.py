"""`tuneline cancel`: cancel the run on the server, if there is one (`flows.run.cancelled`), then signal its process if needed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from flows.server.connect import connect, find_server
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.wording import listed, nearest
from tuneline.workspace.runs import RunRecord
from tuneline.workspace.workspace import Workspace

PATIENCE = 15.0  # seconds in which a run cancelled on the server must end; then its process gets a signal
LAST_SECONDS = 30.0  # in which its programs must end after that


def cancel(workspace: Workspace, what: str, say: Callable[[str], None]) -> str:
    """End the run with the id `what` (ours or Prefect's), or the only run of that pipeline, even if it still waits. Returns its id.

    Raises ConfigError if there is no such run in progress, StageFailed if it does not end.
    """
    alive = [record for record in workspace.runs.newest_first() if workspace.runs.alive(record)]
    chosen = [record for record in alive if what in (record.run_id, record.flow_run, record.pipeline)]
    _check_one(what, [record.run_id for record in chosen])
    server = find_server(workspace.home)
    if not chosen:
        waiting = [what] if _is_id(what) else _waiting(workspace, what) if server and what in workspace.loaded.spec.pipelines else []
        _check_one(what, waiting)
        if server and waiting and _cancel_on_server(workspace.home, waiting[0]):
            return waiting[0]
        raise ConfigError([_no_such_run(workspace, what, alive)])
    (record,) = chosen
    notified = bool(server and record.flow_run and _cancel_on_server(workspace.home, record.flow_run))
    if notified and _ended(workspace, record, PATIENCE):
        return record.run_id
    process = workspace.runs.process(record)
    if process is None and notified:
        say(f"run {record.run_id} is on another machine; the server was notified, and its worker ends the run")
        return record.run_id
    if process is not None:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    if not _ended(workspace, record, LAST_SECONDS):
        where = f"its process {process}" if process else "its process, on another machine or of another user,"
        raise StageFailed(
            "transient", f"run {record.run_id} has not ended: {where} still holds its lock", "end that process, or ask its owner"
        )
    return record.run_id


def _check_one(what: str, ids: list[str]) -> None:
    if len(ids) > 1:
        found = f"found {len(ids)} runs in progress, expected one of {listed(ids)}"
        raise ConfigError([Problem("", found, f"`tuneline cancel {ids[0]}`", place=f"cancel {what}")])


def _waiting(workspace: Workspace, pipeline: str) -> list[str]:
    """Return the ids of the pipeline's unfinished runs on the server, without those that a schedule plans ahead."""
    connect(workspace.home)
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType

    from flows.server.errors import server_errors

    chosen = FlowRunFilter(
        tags=FlowRunFilterTags(all_=["tuneline"]),
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING, StateType.PAUSED, StateType.RUNNING])
        ),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),  # schedules plan a hundred runs ahead
    )
    with server_errors(), get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=chosen, limit=200)
    wanted = {"pipeline": pipeline, "file": str(workspace.loaded.file)}
    its = [run for run in runs if {name: run.parameters.get(name) for name in wanted} == wanted]
    return [str(run.id) for run in its if run.parent_task_run_id is None]


def _is_id(what: str) -> bool:
    try:
        UUID(what)
    except ValueError:
        return False
    return True


def _cancel_on_server(home: Path, flow_run: str) -> bool:
    """Ask the server to cancel the run. Returns False if it does not know the run or the run has ended."""
    connect(home)
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelling

    from flows.server.errors import server_errors

    with server_errors(), get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run)).state
        except ObjectNotFound:
            return False
        if state is not None and state.is_final():
            return False
        client.set_flow_run_state(UUID(flow_run), Cancelling(message="cancelled by `tuneline cancel`"))
        return True


def _ended(workspace: Workspace, record: RunRecord, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while workspace.runs.alive(workspace.runs.get(record.pipeline, record.run_id)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _no_such_run(workspace: Workspace, what: str, alive: list[RunRecord]) -> Problem:
    known = [name for record in alive for name in (record.pipeline, record.run_id)]
    ended = next((record for record in workspace.runs.newest_first() if what in (record.run_id, record.flow_run, record.pipeline)), None)
    found = f"found run {ended.run_id} of {ended.pipeline}, which has ended ({ended.state})" if ended else "found no such run"
    hint = nearest(what, known) if ended is None else ""
    return Problem(
        "",
        f"{found}, expected a run in progress: {listed(known)}",
        hint or "`tuneline status` shows the runs in progress",
        place=f"cancel {what}",
    )
