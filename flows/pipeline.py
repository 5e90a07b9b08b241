"""The flow of a pipeline: submit every stage as a task, wait, and return the state of the run.

Upstream results are passed as `allow_failure` futures: Prefect draws the edge, and a stage whose upstream stage failed runs just
far enough to end as `Skipped`. The task runner has a thread for each stage; `flows/run/slots.py` limits the programs that run at once.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import UUID

import prefect.flow_engine
from prefect import allow_failure, flow, get_run_logger
from prefect._internal.control_listener import get_intent
from prefect.client.schemas import State
from prefect.concurrency._leases import maintain_concurrency_lease
from prefect.exceptions import FailedRun, TerminationSignal
from prefect.futures import wait
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.utilities.urls import url_for

from flows.machine import visible_gpus
from flows.report.artifacts import Publisher
from flows.report.html import report_of
from flows.report.markdown import run_report
from flows.run.cancelled import Watch, callers
from flows.run.missed import SKIPPED, missed
from flows.run.parent_watch import end_with_parent
from flows.run.run_context import NoReporter, Reporter, RunContext
from flows.run.run_stage import run_stage
from flows.run.slots import Slots
from flows.run.stage import FAILED, stage_task
from flows.run.supervisor import Supervisor
from tuneline import __version__
from tuneline.config.load import Loaded, load
from tuneline.config.order import depends_on
from tuneline.config.overrides import as_sets
from tuneline.errors import ConfigError, Problem, StageFailed, StoreError, TunelineError
from tuneline.kinds.fields import NAME
from tuneline.patches import patch
from tuneline.planning.plan import check_stages
from tuneline.workspace.runs import RunRecord, Runs, RunState, planned
from tuneline.workspace.workspace import Workspace

__all__ = ["REPORTER", "run_pipeline", "run_stage"]  # run_stage: entrypoint of the child deployments
DEPLOYED = "TUNELINE_DEPLOYED"  # environment variable of deployed runs: the version of tuneline that deployed them
REPORTER: ContextVar[Reporter] = ContextVar("reporter", default=NoReporter())  # noqa: B039  (NoReporter has no state)


@flow(name="pipeline", validate_parameters=True)
def run_pipeline(
    pipeline: str,
    file: str = "pipelines.yaml",
    overrides: dict[str, Any] = {},  # noqa: B006  (Prefect shows the default; it is never changed)
    variables: dict[str, Any] = {},  # noqa: B006
    only: str | None = None,
    force: list[str] = [],  # noqa: B006
) -> Any:
    """Run a pipeline of a pipelines.yaml.

    Args:
        pipeline: The pipeline's name.
        file: The pipelines file.
        overrides: Fields of stages to change, as {"sft.lora.r": 32}. Checked like `--set` of the command line.
        variables: Variables of the file (`vars`) to change, as {"lr": 0.0001}.
        only: Run only this stage and its upstream stages.
        force: Stages to rebuild even if they are cached.
    """
    logger = get_run_logger()
    if (theirs := os.environ.get(DEPLOYED, __version__)) != __version__:
        logger.warning(f"deployed by tuneline {theirs}, this worker has {__version__}: upgrade one of them, then run `tuneline deploy`")
    if deployment.id is not None and flow_run.flow_name not in (pipeline, run_pipeline.name):
        found = f"found {pipeline}, expected {flow_run.flow_name}, the pipeline of the deployment"
        raise ConfigError([Problem("", found, f"`tuneline run {pipeline}`, or `tuneline submit {pipeline}`", place="pipeline")])
    loaded = load(Path(file), pipeline, as_sets(overrides), as_sets(variables))
    check_stages(loaded, pipeline, only, force)
    workspace = _opened(loaded)
    if deployment.id is not None and (why := missed(UUID(flow_run.id), loaded.pipeline(pipeline))):
        return Completed(name=SKIPPED, message=why)
    record = workspace.runs.begin(pipeline, loaded.overrides)
    record.only, record.force, record.flow_run = only, tuple(force), flow_run.id
    run = _begun(workspace, record, {"pipeline": pipeline, "file": str(loaded.file), "overrides": overrides, "variables": variables})
    watch = Watch(UUID(flow_run.id), run.supervisor, callers=callers())
    futures: dict[str, Any] = {}
    try:
        for plan in record.planned:
            needs = {need: allow_failure(futures[need]) for need in depends_on(run.stages[plan.stage])}
            futures[plan.stage] = stage_task(run, plan.stage).submit(needs)
        wait(list(futures.values()))
    except BaseException as error:  # a signal reaches only this thread
        run.supervisor.stop()
        _end(run, watch, "failed" if isinstance(error, Exception) else "cancelled")
        if not isinstance(error, KeyboardInterrupt | TerminationSignal) or get_intent():  # an intent: who sent the signal sets the state
            raise
        run.reporter.interrupted(error)
        return Cancelled(message="it was stopped by a signal", data=record.run_id)  # Prefect would say Crashed, unlike the record
    if watch.why:
        _end(run, watch, "cancelled")
        return Cancelled(message=watch.why, data=record.run_id)
    record.stages.sort(key=lambda stage: list(futures).index(stage.stage))
    state = _state({name: future.state for name, future in futures.items()}, record.run_id)
    outcome: dict[str, RunState] = {"Completed": "completed", "Refused": "refused"}
    _end(run, watch, outcome.get(state.name or "", "failed"))
    return state


def _opened(loaded: Loaded) -> Workspace:
    """Return the workspace with its store. What it warns about goes to the server's log and to the terminal."""
    logger, reporter = get_run_logger(), REPORTER.get()

    def warn(message: str) -> None:
        logger.warning(message)
        reporter.warning("store", message)

    workspace = Workspace(loaded, warn)
    with suppress(StoreError):  # a read-only store is enough for cached stages; a stage to build meets the same error
        workspace.prepare_store()
    return workspace


def _begun(workspace: Workspace, record: RunRecord, parameters: dict[str, Any]) -> RunContext:
    """Save the record with its plan, announce the run, and return what its stages share. `parameters`: the flow's, for child runs."""
    pipeline, reporter, publisher = record.pipeline, REPORTER.get(), Publisher()
    spec = workspace.loaded.pipeline(pipeline)
    record.planned = planned(spec, record.only)
    workspace.runs.save(record)
    reporter.began(record.run_id, url_for("flow-run", obj_id=flow_run.id))
    publisher.name_run(f"{pipeline}-{record.run_id.rpartition('-')[2]}", ["tuneline", pipeline, *spec.tags])
    slots, in_pool = Slots(spec.parallel, visible_gpus()), deployment.id is not None
    if in_pool:
        end_with_parent()
    forced = frozenset(record.force)
    return RunContext(workspace, pipeline, record, Supervisor(), slots, reporter, publisher, forced, parameters if in_pool else None)


def _end(run: RunContext, watch: Watch, outcome: RunState) -> None:
    """Record the end of the run, and publish its report."""
    watch.close()
    run.finish(outcome)
    about = run.workspace.loaded.pipeline(run.pipeline).description or f"run {run.record.run_id} of {run.pipeline}"
    run.publisher.markdown(f"run-{run.pipeline}", lambda: _report(run.workspace.runs, run.record), about)
    run.publisher.close()


def __getattr__(name: str) -> Any:
    """Return the flow under the name of a pipeline: `tuneline.deployed.NAME` is the entrypoint of the deployment NAME/NAME."""
    if re.fullmatch(NAME.strip("^$"), name):
        return run_pipeline.with_options(name=name)
    raise AttributeError(name)


def _report(runs: Runs, record: RunRecord) -> str:
    with suppress(OSError):  # publish the rest without the HTML report
        report_of(runs, record)
    return run_report(record, runs.folder / f"{record.run_id}.html")


def _state(states: dict[str, State[Any]], run_id: str) -> State[Any]:
    refused = [name for name, state in states.items() if state.name == "Refused"]
    failed = {name: state.name or "" for name, state in states.items() if not state.is_completed() and name not in refused}
    if failed:
        stages = (f"{name} ({state.removeprefix(FAILED)})" if state.startswith(FAILED) else name for name, state in failed.items())
        return Failed(message=f"failed: {', '.join(stages)}", data=run_id)
    if refused:
        return Failed(name="Refused", message=f"refused by {', '.join(refused)}", data=run_id)
    return Completed(message=f"run {run_id}", data=run_id)


class _OwnFailuresWithoutTraceback(logging.Filter):
    """Remove tracebacks through our supervisor from the log, which do not help users. Class `bug` shows the program's own traceback.

    Also drops the second report of the error that Prefect logs under a worker at its exit.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info == (None, None, None):  # Prefect logs a returned failure a second time, as an error
            return False
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, FailedRun | TunelineError) and record.getMessage().startswith("Engine execution exited"):
            return False
        if isinstance(error, TunelineError):
            record.exc_info = record.exc_text = None
            details = error.details if isinstance(error, StageFailed) and error.failure_class == "bug" else ""
            record.msg, record.args = f"{error}\n{details}".rstrip(), ()
        return True


def _maintain_without_ending(lease_id: UUID, seconds: float, **_: Any) -> AbstractContextManager[None]:
    """Keep the lease of the deployment's concurrency slot without ending the run if it is lost.

    If the lease cannot be renewed (the server is down for a minute, or was restarted), Prefect ends the run, even after ten hours. Ours
    continues: if another run starts meanwhile, keys and GPUs have their own locks.
    """
    return maintain_concurrency_lease(lease_id, seconds, raise_on_lease_renewal_failure=False, suppress_warnings=True)


patch(prefect.flow_engine, "maintain_concurrency_lease", _maintain_without_ending)

for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_OwnFailuresWithoutTraceback())
