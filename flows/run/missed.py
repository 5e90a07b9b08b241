"""Handle scheduled runs that could not start when they were due, because the server or every worker was down.

Prefect keeps them and starts them all, the oldest first. `catch_up` of a schedule says which of them run: only the newest (`latest`), all,
or none. The first one that starts marks those that it replaces as skipped.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException
from prefect.states import Completed

from tuneline.config.spec import Pipeline

START = 120  # seconds that a start may take: a run in time is not missed, even if the next one of a short interval is due by then
LATE = 600  # seconds, after which a run counts as missed where `catch_up` is `none`
SKIPPED = "Skipped"


def missed(flow_run: UUID, pipeline: Pipeline) -> str | None:
    """Return why the run is to be skipped, or None if it is to run. Also marks older waiting runs of its schedule as skipped.

    Returns None if the server does not answer: that must not stop a run.
    """
    try:
        return _missed(flow_run, pipeline)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning(f"cannot find out whether a newer run of the schedule waits: {error}")
        return None


def _missed(flow_run: UUID, pipeline: Pipeline) -> str | None:
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run)
        schedule = _schedule(run)
        if (
            schedule is None or run.run_count > 1 or run.deployment_id is None or run.expected_start_time is None
        ):  # started by hand, or a retry
            return None
        name = run.created_by.display_value if run.created_by else None
        known = pipeline.schedules.get(name or "")
        catch_up, now = known.catch_up if known else "latest", datetime.now(UTC)
        late = (now - run.expected_start_time).total_seconds()
        if catch_up == "all":
            return None
        if catch_up == "none":
            return f"missed: it could only start {late // 60:.0f} min late (catch_up: none)" if late > LATE else None
        due = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[run.deployment_id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=now),
        )
        runs = client.read_flow_runs(flow_run_filter=due, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=200)
        waiting = [each for each in runs if _schedule(each) == schedule and each.id != run.id and each.expected_start_time is not None]
        replaced_by = [] if late <= START else [each.expected_start_time for each in waiting if each.expected_start_time]
        newest = max([run.expected_start_time, *replaced_by])
        message = f"missed: the run of {newest.astimezone():%Y-%m-%d %H:%M} replaces it (catch_up: latest)"
        for each in waiting:
            if each.expected_start_time and each.expected_start_time < newest:
                client.set_flow_run_state(each.id, Completed(name=SKIPPED, message=message), force=True)
        return message if run.expected_start_time < newest else None


def _schedule(run: Any) -> UUID | None:
    """Return the schedule that created a run, or None."""
    created = run.created_by
    return created.id if run.auto_scheduled and created and created.type == "SCHEDULE" else None
