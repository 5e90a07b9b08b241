"""`tuneline submit`: start a run of a deployment by the pipeline's name, and follow it."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, Log, State
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for

from flows.deploy.desired import TAG
from flows.server.errors import server_errors
from flows.server.waiting import why
from tuneline.errors import ConfigError, Problem
from tuneline.wording import listed, nearest

POLL_SECONDS = 2.0
LAST_SECONDS = 3.0  # in which the last log lines arrive after the final state
LAST_READS = 10  # of logs after the final state, while tasks of lines are not recorded yet
PAGE = 200
OUTCOMES = {"COMPLETED": "completed", "FAILED": "failed", "CRASHED": "failed", "CANCELLED": "cancelled"}


def submit(file: Path, name: str, parameters: dict[str, Any], queue: str | None, watch: bool, as_json: bool) -> str:
    """Start a run of the deployment `name`, or FLOW/DEPLOYMENT, on the server at PREFECT_API_URL; print its page. With `watch`, follow it.

    Returns `scheduled`, or the outcome; `cancelled` also if the watching is interrupted. Raises ConfigError if not exactly one
    deployment has that name, or if it was deployed from another file.
    """
    run = _start(file, name, parameters, queue)
    state, page = "scheduled", url_for("flow-run", obj_id=run.id)
    if not as_json:
        print(f"{run.id}  {page}", flush=True)
    interrupted = False
    if watch:
        try:
            with server_errors():
                state = follow(run.id, lambda line: print(line, file=sys.stderr, flush=True))
        except KeyboardInterrupt:
            state, interrupted = "running", True
            print(
                f"the run continues; to cancel it: PREFECT_API_URL={os.environ['PREFECT_API_URL']} prefect flow-run cancel {run.id}",
                file=sys.stderr,
            )
    if as_json:
        print(json.dumps({"pipeline": name.split("/")[0], "flow_run_id": str(run.id), "page": page, "state": state}, indent=1))
    return "cancelled" if interrupted else state


def _start(file: Path, name: str, parameters: dict[str, Any], queue: str | None) -> FlowRun:
    with server_errors(), get_client(sync_client=True) as client:
        deployment, full_name = _find(client, name)
        its_file = deployment.parameters.get("file")
        if its_file != str(file):
            found = f"found {full_name}, which was deployed from {its_file}, expected one that was deployed from {file}"
            raise ConfigError([Problem("", found, f"`--file {its_file}`, or `tuneline deploy`", place=f"submit {name}")])
        if queue is not None:
            _refuse_unknown_queue(client, deployment, queue)
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters, work_queue_name=queue)


def follow(run_id: UUID, say: Callable[[str], None]) -> str:
    """Follow the run and its child runs in other pools; pass states and log lines to `say`.

    Returns `completed`, `failed`, `refused` or `cancelled`.
    """
    logs: dict[UUID, LogReader] = {}
    states: dict[UUID, str] = {}
    last_reads = 0
    while True:
        try:
            with get_client(sync_client=True) as client:
                while True:
                    run = client.read_flow_run(run_id)
                    assert run.state is not None
                    if run.state.is_final():
                        time.sleep(LAST_SECONDS)
                        last_reads += 1
                    for each in (run, *_of_stages(client, run_id)):
                        its = logs.setdefault(each.id, LogReader(None if each is run else each.parameters["stage"]))
                        for stage, log in its.new(client, each.id, ended=last_reads >= LAST_READS):
                            say(f"{log.timestamp.astimezone():%H:%M:%S} {stage}{log.message}")
                        now = f"run {_with_reason(client, run, run.state.name or '')}" if each is run else _in_pool(client, each)
                        if states.get(each.id) != now:
                            states[each.id] = now
                            say(f"{datetime.datetime.now():%H:%M:%S} {now}")
                    if run.state.is_final() and not any(reader.waits for reader in logs.values()):
                        return _outcome(run.state)
                    time.sleep(POLL_SECONDS)
        except ObjectNotFound:
            say(f"{datetime.datetime.now():%H:%M:%S} run deleted on the server, which ends it")
            return "cancelled"
        except httpx.TransportError as error:  # the run continues without the server, so keep following
            say(f"the Prefect server does not answer: {error}")
            time.sleep(POLL_SECONDS)


def _of_stages(client: SyncPrefectClient, run_id: UUID) -> list[FlowRun]:
    """Return the child runs: of stages with their own pool (`flows/run/child.py`)."""
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id])))


def _in_pool(client: SyncPrefectClient, run: FlowRun) -> str:
    """Describe a child run: its stage, pool and state."""
    assert run.state is not None
    return f"{run.parameters['stage']}: in pool {run.work_pool_name}: {_with_reason(client, run, (run.state.name or '').lower())}"


def _with_reason(client: SyncPrefectClient, run: FlowRun, state: str) -> str:
    """Return the state, and why the run waits, if it does."""
    waits = why(client, run)
    return f"{state}, {waits}" if waits else state


class LogReader:
    """Reads the new log lines of a run. Lines arrive late and out of order, so the last page is read again."""

    def __init__(self, stage: str | None = None) -> None:
        """Read a run, or with `stage` the child run of that stage."""
        self.waits = False
        """Whether lines wait for the names of their stages."""
        self._stage_of_run = stage
        self._seen: set[UUID] = set()
        self._offset = 0
        self._stages: dict[UUID, str] = {}

    def new(self, client: SyncPrefectClient, run_id: UUID, ended: bool) -> Iterator[tuple[str, Log]]:
        """Yield each new line after `sft: ` if it is one of the stage sft, or an empty text. A line whose task run the server does not know
        yet waits for it, unless reading has `ended`."""
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
        offset, waiting = max(0, self._offset - PAGE), []
        while logs := client.read_logs(of_run, limit=PAGE, offset=offset, sort=LogSort.TIMESTAMP_ASC):
            for place, log in enumerate(logs, offset):
                if log.id in self._seen:
                    continue
                if (stage := self._stage(client, log)) is None and not ended:
                    waiting.append(place)
                    continue
                self._seen.add(log.id)
                yield stage or "", log
            offset += len(logs)
        self._offset, self.waits = min([*waiting, offset]), bool(waiting)

    def _stage(self, client: SyncPrefectClient, log: Log) -> str | None:
        """Return None for a task run that the server does not know: Prefect records them from events, later than their logs or never."""
        if self._stage_of_run is not None:
            return f"{self._stage_of_run}: "
        if log.task_run_id is None:
            return ""
        if log.task_run_id not in self._stages:
            try:
                run = client.read_task_run(log.task_run_id)
            except ObjectNotFound:
                return None
            first = run.name.removesuffix(f"-{run.dynamic_key[:3]}")  # Prefect's name for it, until its start is recorded
            self._stages[log.task_run_id] = f"{first.partition(': ')[0]}: "  # without the figures that are appended at its end
        return self._stages[log.task_run_id]


def _outcome(state: State[Any]) -> str:
    return "refused" if state.name == "Refused" else OUTCOMES[state.type.value]


def _find(client: SyncPrefectClient, name: str) -> tuple[DeploymentResponse, str]:
    flow, _, bare = name.rpartition("/")
    named = {_full_name(client, each): each for each in client.read_deployments(deployment_filter=_named(bare))}
    matches = {full: each for full, each in named.items() if flow in ("", full.split("/")[0])}
    if len(matches) > 1:
        found = f"found {len(matches)} deployments of that name, expected one of {listed(list(matches))}"
        raise ConfigError([Problem("", found, f"`tuneline submit {next(iter(matches))}`", place=f"submit {name}")])
    if not matches:
        tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        known = [_full_name(client, each) for each in client.read_deployments(deployment_filter=tagged)]
        hint = nearest(name, known) or "`tuneline deploy` creates one for each pipeline with a `pool`"
        raise ConfigError([Problem("", f"found no such deployment on the server, expected {listed(known)}", hint, place=f"submit {name}")])
    full_name, deployment = matches.popitem()
    return deployment, full_name


def _named(name: str) -> DeploymentFilter:
    return DeploymentFilter(name=DeploymentFilterName(any_=[name]))


def _full_name(client: SyncPrefectClient, deployment: DeploymentResponse) -> str:
    return f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"


def _refuse_unknown_queue(client: SyncPrefectClient, deployment: DeploymentResponse, queue: str) -> None:
    """Raises ConfigError for an unknown queue: Prefect would create it."""
    path: Any = f"/work_pools/{deployment.work_pool_name}/queues/filter"
    queues = [each["name"] for each in client.request("POST", path, json={"limit": PAGE}).json()]
    if queue not in queues:
        found = f"found the unknown queue `{queue}` of pool `{deployment.work_pool_name}`, expected {listed(queues)}"
        raise ConfigError([Problem("", found, nearest(queue, queues), place="--queue")])
