"""The flow `run-stage`: build one stage for a run in another pool (`flows/run/child.py`).

It computes the key again, from the same file and from the inputs in the store, and fails if the key differs: then the two machines do not
see the same project. It stops once its parent has ended on the server, whether or not the parent's process still exists.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.futures import wait
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.machine import visible_gpus
from flows.report.artifacts import Publisher
from flows.run.cancelled import Watch
from flows.run.child import NAME
from flows.run.parent_watch import end_with_parent
from flows.run.run_context import NoReporter, RunContext
from flows.run.slots import Slots
from flows.run.stage import stage_task
from flows.run.supervisor import Supervisor
from tuneline.config.load import load
from tuneline.config.overrides import as_sets
from tuneline.errors import ConfigError, StageFailed
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.history import input_slots
from tuneline.workspace.runs import RunRecord, planned
from tuneline.workspace.workspace import Workspace


@flow(name=NAME)
def run_stage(
    pipeline: str,
    file: str,
    stage: str,
    key: str,
    inputs: dict[str, str],
    run_id: str,
    overrides: dict[str, Any] = {},  # noqa: B006  (Prefect shows the default; it is never changed)
    variables: dict[str, Any] = {},  # noqa: B006
    commits: list[list[str]] = [],  # noqa: B006
    forced: bool = False,
) -> Any:
    """Build one stage for a run in another pool, which passes all parameters. They are not grouped, because they
    are the deployment's schema, which Prefect shows."""
    workspace = Workspace(load(Path(file), pipeline, as_sets(overrides), as_sets(variables)), get_run_logger().warning)
    spec = workspace.loaded.pipeline(pipeline)
    record = RunRecord(run_id=run_id, pipeline=pipeline, started="", planned=planned(spec, None), flow_run=flow_run.parent_flow_run_id)
    slots, supervisor = Slots(spec.parallel, visible_gpus()), Supervisor()
    publisher, force = Publisher(), frozenset([stage] if forced else [])
    run = RunContext(workspace, pipeline, record, supervisor, slots, NoReporter(), publisher, force, child_of=key)
    run.know_commits(commits)
    needs = {other: _input(workspace, inputs[slot]) for slot, other in input_slots(spec.stages[stage]).items()}
    end_with_parent()
    watches = [Watch(UUID(flow_run.id), supervisor)]
    if parent := flow_run.parent_flow_run_id:

        def alive() -> bool:
            return workspace.runs.alive(workspace.runs.get(pipeline, run_id))

        shared = _holds(alive)  # else locks of the parent's machine are not seen on this one, or the parent has just been killed
        watches.append(Watch(UUID(parent), supervisor, of_parent=True, alive=alive if shared else None))
    try:
        wait([stage_task(run, stage).submit(needs)])
    except BaseException:  # a signal reaches only this thread
        supervisor.stop()
        raise
    finally:
        for watch in watches:
            watch.close()
        publisher.close()
    entry = record.stages[-1]
    outcome = {"done": Completed, "cached": Completed, "cancelled": Cancelled}.get(entry.status, Failed)
    return outcome(message=entry.message or f"{entry.kind}/{key[:12]}")


def _holds(alive: Callable[[], bool]) -> bool:
    try:
        return alive()
    except ConfigError:  # no such record
        return False


def _input(workspace: Workspace, name: str) -> Artifact:
    kind, _, key = name.partition("/")
    artifact = workspace.store.find(kind, key)
    if artifact is None:
        found = f"found no {kind}/{key[:12]}, an input of the stage, in the store {workspace.store.root} of this machine"
        raise StageFailed("config", found, "every pool must see the same project folder and store: docs/operating.md")
    return artifact
