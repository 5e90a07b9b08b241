"""Find out why a run on the server does not start: no worker, a paused pool or queue, or a reached concurrency limit."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

HOLDING = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def why(client: SyncPrefectClient, run: FlowRun) -> str:
    """Return why the run waits, with the command that helps. Empty if it has started or is not due yet."""
    if run.state is None or not run.state.is_scheduled() or (run.expected_start_time and run.expected_start_time > datetime.now(UTC)):
        return ""
    if run.state.name == "AwaitingConcurrencySlot":
        return "another run of its deployment is in progress; this one starts after it"
    return of_pool(client, run.work_pool_name, run.work_queue_name) if run.work_pool_name else "it names no pool, so no worker takes it"


def of_pool(client: SyncPrefectClient, name: str, queue: str | None) -> str:
    """Return why runs of a pool do not start."""
    if closed := unserved(client, name):
        return closed
    its = _queue(client, name, queue) if queue else {}
    if its.get("is_paused"):
        return f"queue {queue} of pool {name} is paused: `prefect work-queue resume {queue} --pool {name}` resumes it"
    limits = [("pool", name, client.read_work_pool(name).concurrency_limit), ("queue", queue, its.get("concurrency_limit"))]
    for what, named, limit in limits:
        if limit is not None and _held(client, name, queue if what == "queue" else None) >= limit:
            return f"the concurrency limit of {what} {named} is reached ({limit})"
    return "a worker picks it up shortly"


def unserved(client: SyncPrefectClient, pool: str) -> str:
    """Return why no worker serves the pool, or an empty string if one is online."""
    try:
        paused = client.read_work_pool(pool).is_paused
    except ObjectNotFound:
        return f"the server has no pool {pool}: `tuneline deploy` creates it"
    if paused:
        return f"pool {pool} is paused: `prefect work-pool resume {pool}` resumes it"
    online = any(worker.status.value == "ONLINE" for worker in client.read_workers_for_work_pool(pool))
    return "" if online else f"no worker is online: `tuneline worker {pool}` starts one"


def _queue(client: SyncPrefectClient, pool: str, queue: str) -> dict[str, Any]:
    path: Any = f"/work_pools/{pool}/queues/{queue}"
    try:
        return dict(client.request("GET", path).json())
    except ObjectNotFound:
        return {}


def _held(client: SyncPrefectClient, pool: str, queue: str | None) -> int:
    """Return the number of concurrency slots that runs hold."""
    holding = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=HOLDING)))
    its = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    runs = client.read_flow_runs(flow_run_filter=holding, work_pool_filter=its, limit=200)
    return sum(queue in (None, run.work_queue_name) for run in runs)
