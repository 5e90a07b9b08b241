"""A stage in another pool, seen from its parent: a child run is asked for, waited for, and taken back whatever happens.

    key -> not in the store -> run-stage/run-stage-POOL with key, inputs and commits -> waits -> the artifact is in the store

What the child does is `flows/run/run_stage.py`. Both see the same project folder, store and work folders (docs/operating.md), so a
checkpoint that one machine wrote another goes on from. A parent that stops cancels its child.
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
from tuneline.workspace.store import Artifact

NAME = "run-stage"
POLL = 2.0  # seconds between two looks at a child
LAST_WORDS = 20.0  # seconds in which a stopped parent tries to reach the server to cancel its child


def build_in_pool(name: str, stage: ProgramStage, inputs: Mapping[str, Artifact], wanted: dict[str, Any], supervisor: Supervisor) -> None:
    """Has the stage built in its pool; returns once it is. `wanted` are the child's parameters but for stage and inputs.

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
    """The child's last state; None where the parent is stopped, and the child with it. A server that is away is waited for."""
    stopped_at: float | None = None
    while stopped_at is None or time.monotonic() - stopped_at < LAST_WORDS:
        with suppress(Exception), get_client(sync_client=True) as client:  # whatever an unreachable server raises
            if supervisor.stopping:
                client.set_flow_run_state(child, Cancelling(message="the run that it belongs to was stopped"))
                return None
            state = client.read_flow_run(child).state
            if state is not None and state.is_final():
                return state
        stopped_at = stopped_at or (time.monotonic() if supervisor.stopping else None)
        supervisor.pause(POLL)
    return None


def _failure(state: State[Any], child: FlowRun) -> StageFailed:
    """It is final: the child has used the stage's retries."""
    for failure_class in get_args(FailureClass):
        if (state.message or "").startswith(f"{failure_class}: "):
            message, _, hint = (state.message or "").removeprefix(f"{failure_class}: ").partition("\n\nhint: ")
            return StageFailed(failure_class, message, hint, final=True)
    message = f"its run in another pool ended {state.name}: {state.message or 'nobody said why'}"
    return StageFailed("transient", message, f"`prefect flow-run logs {child.id}`", final=True)
