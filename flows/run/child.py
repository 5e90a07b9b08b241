"""Build a stage in another pool, seen from its parent: start a child run, wait for it, cancel it if the parent stops.

    key -> not in the store -> run-stage/run-stage-POOL with key, inputs and commits -> waits -> the artifact is in the store

The child runs `flows/run/run_stage.py`. Both see the same project folder, store and work folders (docs/operating.md), so one
machine can resume from a checkpoint that another wrote.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from flows.run.supervisor import Supervisor
from tuneline.errors import FailureClass, StageFailed, StageStopped
from tuneline.kinds.stage import ProgramStage
from tuneline.workspace.artifact import Artifact

NAME = "run-stage"
POLL = 2.0  # seconds between two polls of a child's state
LAST_WORDS = 20.0  # seconds in which a stopped parent tries to reach the server to cancel its child


def build_in_pool(name: str, stage: ProgramStage, inputs: Mapping[str, Artifact], wanted: dict[str, Any], supervisor: Supervisor) -> None:
    """Build the stage in its pool and return once it is built. `wanted`: the child's parameters except stage and inputs.

    Raises StageFailed with the child's own class and message.
    """
    slots = {slot: f"{artifact.manifest.kind}/{artifact.key}" for slot, artifact in inputs.items()}
    deployed = f"{NAME}/{NAME}-{stage.pool}"
    try:
        child = run_deployment(
            deployed,
            parameters={**wanted, "stage": name, "inputs": slots},
            timeout=0,
            flow_run_name=f"{wanted['pipeline']}-{name}",
            tags=["tuneline", wanted["pipeline"]],
        )
    except ObjectNotFound:
        raise StageFailed("config", f"found no deployment `{deployed}` for the stage's pool", "`tuneline deploy` creates it") from None
    assert isinstance(child, FlowRun)
    get_run_logger().info(f"runs in pool {stage.pool}: flow run {child.name}, {child.id}")
    state = _end_of(child.id, supervisor)
    if state is None:
        raise StageStopped
    if not state.is_completed():
        raise _failure(state, child)


def _end_of(child: UUID, supervisor: Supervisor) -> State[Any] | None:
    """Return the child's final state, or None if the parent is stopped; then the child is cancelled. Waits while the server is down."""
    stopped_at: float | None = None
    while stopped_at is None or time.monotonic() - stopped_at < LAST_WORDS:
        with suppress(Exception), get_client(sync_client=True) as client:  # whatever an unreachable server raises
            if supervisor.stopping:
                client.set_flow_run_state(child, Cancelling(message="its parent run was stopped"))
                return None
            state = client.read_flow_run(child).state
            if state is not None and state.is_final():
                return state
        stopped_at = stopped_at or (time.monotonic() if supervisor.stopping else None)
        supervisor.pause(POLL)
    return None


def _failure(state: State[Any], child: FlowRun) -> StageFailed:
    """Return the child's failure, final because the child has used the stage's retries."""
    for failure_class in get_args(FailureClass):
        if (state.message or "").startswith(f"{failure_class}: "):
            message, _, hint = (state.message or "").removeprefix(f"{failure_class}: ").partition("\n\nhint: ")
            return StageFailed(failure_class, message, hint, final=True)
    message = f"its run in another pool ended {state.name}: {state.message or 'no reason given'}"
    return StageFailed("transient", message, f"`prefect flow-run logs {child.id}`", final=True)
