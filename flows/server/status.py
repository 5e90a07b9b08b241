"""`tuneline status`: the runs in progress from the project's run records, and the unfinished runs on its server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.report.eta import Eta
from tuneline.workspace.file_names import EVENTS
from tuneline.workspace.protocol import Event
from tuneline.workspace.runs import RunRecord, StageRecord
from tuneline.workspace.workspace import Workspace

SHOWN = 200  # runs of the server, Prefect's page


@dataclass(frozen=True)
class Working:
    """A stage that is being built."""

    pipeline: str
    run_id: str
    flow_run: str | None
    stage: str
    kind: str
    seconds: float
    progress: str
    """A sentence with the time left; empty until the program sends its first event."""


@dataclass(frozen=True)
class OnServer:
    """An unfinished run on the server."""

    flow_run: str
    name: str
    state: str
    since: str
    """When it entered this state, or is scheduled to start."""
    pool: str
    message: str
    """Why it waits, or else the message of its state."""


def working(workspace: Workspace) -> list[Working]:
    """Return a row for each stage in progress. A run between stages has a row without a stage."""
    found = []
    for record in workspace.runs.newest_first():
        if not workspace.runs.alive(record):
            continue
        stages = [stage for stage in record.stages if stage.status == "running"]
        for stage in stages or [StageRecord(stage="", kind="", status="running")]:
            seconds = stage.seconds or _elapsed(record)
            progress = _progress(workspace.work(stage.key), stage.stage) if stage.key else ""
            found.append(Working(record.pipeline, record.run_id, record.flow_run, stage.stage, stage.kind, seconds, progress))
    return found


def _elapsed(record: RunRecord) -> float:
    return round((datetime.now(UTC) - datetime.fromisoformat(record.started)).total_seconds(), 1)


def _progress(work: Path, stage: str) -> str:
    eta = Eta(stage)
    with contextlib.suppress(OSError):  # no file before the program's first event
        for line in (work / EVENTS).read_bytes().splitlines():
            with contextlib.suppress(ValidationError):  # cut short by a kill
                eta.take(Event.model_validate_json(line))
    return eta.latest[1].removeprefix(f"{stage}: ") if eta.latest else ""


def on_server() -> list[OnServer]:
    """Return the unfinished runs (running, waiting or late) on the server at PREFECT_API_URL, and the next run of each schedule.

    Raises TunelineError.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    from flows.server.errors import server_errors
    from flows.server.waiting import why

    unended = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING, StateType.SCHEDULED, StateType.PAUSED]
    chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=["tuneline"]), state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unended)))
    with server_errors(), get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=SHOWN)
        running_first = sorted(_without_later_ones(runs), key=lambda run: run.state is not None and run.state.type == StateType.SCHEDULED)
        return [_row(run, why(client, run)) for run in running_first]


def _without_later_ones(runs: list[Any]) -> Iterator[Any]:
    """Prefect creates up to a hundred runs of a schedule ahead. `runs`: by the time of their start."""
    now, planned = datetime.now(UTC), set[Any]()
    for run in runs:
        if run.auto_scheduled and run.state.type.value == "SCHEDULED" and run.expected_start_time > now:
            if run.created_by.id in planned:
                continue
            planned.add(run.created_by.id)
        yield run


def _row(run: Any, waits: str) -> OnServer:
    moment = run.expected_start_time if run.state.type.value == "SCHEDULED" else run.state.timestamp
    since = moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""
    return OnServer(str(run.id), run.name, run.state.name, since, run.work_pool_name or "", waits or run.state.message or "")
