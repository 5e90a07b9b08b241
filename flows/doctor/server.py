"""Check the Prefect server: pools and their workers, runs that hang, and runs whose process is gone.

A run is certainly dead if its record in `.tuneline/runs/` is not locked: the process of a live run holds that lock, on any machine.
`infrastructure_pid` proves nothing, because it does not name the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from packaging.version import Version

from flows.doctor.check import OK, PROBLEM, WARNING, Check
from flows.folders import home_of, runs_in, server_in
from flows.server import server_state
from tuneline.config.load import Loaded
from tuneline.config.pools import ProcessPool
from tuneline.errors import StoreError
from tuneline.workspace.runs import RunRecord, Runs

STUCK = timedelta(minutes=15)  # from Pending to Running; a worker takes seconds, a large image may take minutes
LATE = timedelta(minutes=2)  # after which a due run should have started
SETTLED = timedelta(minutes=1)  # after which the server should know how a run ended
MAX_RUNS = 200  # runs to check, newest first


def examine_server(loaded: Loaded, address: str, fix: bool) -> Iterator[Check]:
    """Check the server at `address`, which answers and is PREFECT_API_URL."""
    import httpx
    from prefect import __version__
    from prefect.client.orchestration import get_client

    home = home_of(loaded.root)
    try:
        with get_client(sync_client=True) as client:
            yield _server(address, client.api_version(), __version__)
            yield from _pools(loaded, client, server_state.read(server_in(home)), address)
            yield from _runs(client, home, fix)
    except httpx.HTTPError as error:
        yield Check("server", PROBLEM, f"{address} rejects the request: {error}".splitlines()[0], "check PREFECT_API_KEY")


def _server(address: str, theirs: str, here: str) -> Check:
    if Version(theirs) < Version(here):
        message = f"{address} runs Prefect {theirs}, older than the {here} here, which it may not understand"
        return Check("server", WARNING, message, "tuneline down, then tuneline up; or upgrade that server")
    return Check("server", OK, f"{address}, Prefect {theirs}")


def _pools(loaded: Loaded, client: Any, state: server_state.State | None, address: str) -> Iterator[Check]:
    there = {pool.name: pool for pool in client.read_work_pools()}
    for name, pool in loaded.spec.pools.items():
        check, local = f"pool {name}", isinstance(pool, ProcessPool) and pool.local
        start = "tuneline up" if local else f"tuneline worker {name}, where it should work"
        ours = state.workers.get(name) if state and state.address == address else None
        if name not in there:
            yield Check(check, PROBLEM, "the server does not know it", "tuneline up" if local else "tuneline deploy")
        elif there[name].type != pool.type:
            hint = f"prefect work-pool delete {name}, then tuneline deploy"
            yield Check(check, PROBLEM, f"it is of type {there[name].type} on the server, {pool.type} in the file", hint)
        elif there[name].is_paused:
            yield Check(check, WARNING, "it is paused: its runs do not start", f"prefect work-pool resume {name}")
        elif ours and not ours.alive:
            yield Check(check, PROBLEM, "the worker that `up` started has ended", "tuneline up")
        elif online := [worker.name for worker in client.read_workers_for_work_pool(name) if worker.status.value == "ONLINE"]:
            yield Check(check, OK, f"works on {', '.join(sorted(online))}")
        else:
            yield Check(check, PROBLEM, "no worker is online: its runs wait forever", start)


def _runs(client: Any, home: Path, fix: bool) -> Iterator[Check]:
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    from flows.server.waiting import why

    wanted = FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    due = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))  # schedules plan a hundred runs ahead
    chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=["tuneline"]), state=FlowRunFilterState(type=wanted), expected_start_time=due)
    try:
        # The newest of a run that Prefect has run again, by Retry: it has the state that counts.
        records = {record.flow_run: record for record in reversed(Runs(runs_in(home)).every()) if record.flow_run}
    except StoreError as error:
        yield Check("runs", PROBLEM, error.message, error.hint)
        return
    now, wrong = datetime.now(UTC), 0
    for run in client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=MAX_RUNS):
        check, record = f"run {run.name} {run.id}", records.get(str(run.id))
        if record and _ended(record, now):
            wrong += 1
            message = f"{run.state.name} on the server, but its process is gone (run {record.run_id}: {record.state})"
            if fix:
                client.set_flow_run_state(run.id, _state(record), force=True)
                yield Check(check, OK, f"{message}; now {record_state(record)} there")
            else:
                yield Check(check, PROBLEM, message, "tuneline doctor --fix")
        elif run.state.type == StateType.SCHEDULED:
            if run.expected_start_time and now - run.expected_start_time > LATE and (waits := why(client, run)):
                wrong += 1
                minutes = int((now - run.expected_start_time).total_seconds() // 60)
                yield Check(check, WARNING, f"{run.state.name}, due for {minutes} min: {waits}", f"prefect flow-run cancel {run.id}")
        elif run.state.type != StateType.RUNNING and now - run.state.timestamp > STUCK:
            wrong += 1
            minutes = (now - run.state.timestamp) // timedelta(minutes=1)
            pending = run.state.type == StateType.PENDING
            hint = f"prefect flow-run cancel {run.id}" if pending else f"prefect flow-run delete {run.id}, once no process of it is left"
            yield Check(check, PROBLEM, f"{run.state.name} for {minutes} min: it holds a slot of its pool", hint)
    if not wrong:
        yield Check("runs", OK, "no run hangs")


def _ended(record: RunRecord, now: datetime) -> bool:
    """Return whether the run has ended. An unlocked record in state `running` is read as `killed`."""
    if record.state == "killed":
        return True
    return record.state != "running" and record.finished is not None and now - datetime.fromisoformat(record.finished) > SETTLED


def record_state(record: RunRecord) -> str:
    return {"completed": "Completed", "failed": "Failed", "refused": "Refused", "cancelled": "Cancelled"}.get(record.state, "Crashed")


def _state(record: RunRecord) -> Any:
    from prefect.states import Cancelled, Completed, Crashed, Failed

    message = f"tuneline doctor: the process is gone; its record {record.run_id} says {record.state}"
    states = {"completed": Completed, "failed": Failed, "refused": Failed, "cancelled": Cancelled}
    return states.get(record.state, Crashed)(name=record_state(record), message=message)
