"""The Prefect task of a stage: find its artifact in the store or build it.

    needs succeeded? -> key -> in the store? -> lock -> in the store now? -> a slot -> program under the watchdog -> publish

Prefect's own cache is off: the store is the only cache. The failure class (`flows/run/attempts.py`), not the exception type, decides
whether a stage is retried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State, TaskRun
from prefect.context import TaskRunContext
from prefect.runtime import task_run
from prefect.states import Cancelled, Completed, Failed

from flows.report.tables import figures
from flows.run.build import Job, build, require_key_content
from flows.run.child import build_in_pool
from flows.run.run_context import RunContext
from flows.run.slots import Taken
from tuneline import disk
from tuneline.canonical import key_of
from tuneline.errors import StageFailed, StageStopped, StoreError, TunelineError
from tuneline.kinds.gate import GateStage
from tuneline.kinds.model import ModelStage
from tuneline.kinds.stage import ProgramStage, Stage
from tuneline.planning.inputs import hub_inputs
from tuneline.planning.plan import document_of
from tuneline.planning.verdict import judge
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.history import input_slots
from tuneline.workspace.reference import REFERENCE, point

PASSED = "passed"  # the result of a gate
FAILED = "Failed: "  # prefix of a state's name, before the failure class
RETRY_DELAYS = [2.0, 15.0, 60.0, 300.0]  # seconds, by attempt; the last one repeats


def stage_task(run: RunContext, name: str) -> Task[[dict[str, Any]], Any]:
    """Return the Prefect task of one stage. Its parameter: the results of its upstream stages by name."""
    stage = run.stages[name]

    def may_retry(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
        return not run.supervisor.stopping and _retryable(state)

    @task(
        name=name,
        task_run_name=name,
        description=stage.description or f"{stage.kind} of {run.pipeline}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=stage.retries,
        retry_delay_seconds=0,  # `supervise` waits itself, so that a stop ends the wait
        retry_condition_fn=may_retry,
    )
    def supervise(needs: dict[str, Any]) -> Any:
        # Sent with the final state. A tag from the start would be a concurrency limit that Prefect asks the server about, and a stage
        # must be able to start while the server is down.
        TaskRunContext.get().task_run.tags = [stage.kind]  # type: ignore[union-attr]
        if task_run.run_count > 1:
            run.supervisor.pause(RETRY_DELAYS[min(task_run.run_count - 2, len(RETRY_DELAYS) - 1)])
        try:
            ended = _carry_out(run, name, stage, needs)
            _show_figures(run, name)
            return ended
        except StageStopped as error:
            run.note(name, "cancelled", message=error.message)
            return Cancelled(message=error.message)
        except StageFailed as error:
            if error.retryable and task_run.run_count <= stage.retries and not run.supervisor.stopping:
                run.warn(name, f"{error.failure_class}: {error.message} ({error.hint})")
                raise
            return _failed(run, name, error)
        except Exception as error:
            if failure := _of_store(run, error):
                return _failed(run, name, failure)
            message = str(error) if isinstance(error, TunelineError) else f"{type(error).__name__}: {error}"
            run.note(name, "failed", message=message)
            raise

    return supervise


def _show_figures(run: RunContext, name: str) -> None:
    """Append the key figures to the task run's name, which the UI lists. Sent with the final state, as the tags are."""
    entry = next((entry for entry in run.record.stages if entry.stage == name), None)
    if entry and (shown := figures(entry)):
        TaskRunContext.get().task_run.name = f"{name}: {shown}"  # type: ignore[union-attr]


def _failed(run: RunContext, name: str, error: StageFailed) -> State[Any]:
    """Return the final state of a failed stage, named after its failure class."""
    details = f"\n{error.details}" if error.failure_class == "bug" else ""
    get_run_logger().error(f"{error.failure_class}: {error}{details}")
    run.note(name, "failed", message=f"{error.failure_class}: {error}{details}")
    return Failed(name=f"{FAILED}{error.failure_class}", message=str(error))


def _of_store(run: RunContext, error: Exception) -> StageFailed | None:
    """Return the stage's failure if the error comes from the disk or the store, else None."""
    if isinstance(error, StoreError):
        return StageFailed("disk" if disk.is_of_disk(error) else "config", error.message, error.hint)
    if isinstance(error, OSError) and error.errno in disk.NUMBERS:
        return disk.of_flow(error, run.workspace.home)
    return None


def _retryable(state: State[Any]) -> bool:
    return isinstance(state.data, StageFailed) and state.data.retryable


def _carry_out(run: RunContext, name: str, stage: Stage, needs: dict[str, Any]) -> Any:
    absent = [need for need, value in needs.items() if value is None or isinstance(value, BaseException)]
    if absent:
        message = f"needs {', '.join(absent)}"
        run.note(name, "skipped", message=message)
        return Completed(name="Skipped", message=message)
    if isinstance(stage, GateStage):
        return _pass_gate(run, name, stage)
    assert isinstance(stage, ProgramStage)
    inputs = {slot: needs[other] for slot, other in input_slots(stage).items()}
    resolved = run.resolve(stage)
    document = document_of(stage, inputs, resolved, run.workspace.loaded.spec.pipelines[run.pipeline])
    key = run.keys[name] = key_of(document)
    job = Job(name, stage, inputs, resolved, document, key)
    if run.child_of not in (None, key):
        found = f"found the key {key[:12]}, expected {(run.child_of or '')[:12]}, which the parent run computes"
        raise StageFailed("config", found, "both must see the same files and have the same version of tuneline: docs/operating.md")
    artifact = _cached(run, job)
    if artifact is None and run.parameters is not None and stage.pool not in (None, run.workspace.loaded.spec.pipelines[run.pipeline].pool):
        return _build_elsewhere(run, job)
    if artifact is None:
        with _lock(run, job) as held:
            artifact = _cached(run, job)
            if artifact is None:
                with _slot(run, job) as taken, run.attempt(name, key):
                    artifact = build(run, job, held, taken)
                run.note(name, "done", artifact)
                return artifact
    return Completed(name="Cached", message=f"{stage.kind}/{key[:12]} is in the store", data=artifact)


def _build_elsewhere(run: RunContext, job: Job) -> Artifact:
    """Build the stage in its own pool, by a child run."""
    name, stage, key = job.name, job.stage, job.key
    wanted = {**(run.parameters or {}), "key": key, "run_id": run.record.run_id, "forced": name in run.forced}
    wanted["commits"] = [[*known, run.commit(*known)] for _, *known in hub_inputs(run.workspace, stage)]
    run.reporter.started(name, f"{stage.kind} in pool {stage.pool}")
    with run.attempt(name, key):
        try:
            build_in_pool(name, stage, job.inputs, wanted, run.supervisor)
        except StageStopped:
            raise
        except StageFailed as error:
            # A child that ends while the server is away cannot report how, and counts as crashed there. The store knows.
            if error.failure_class != "transient" or name in run.forced or run.workspace.store.find(stage.kind, key) is None:
                raise
    with run.workspace.store.shared_lock():
        artifact = run.workspace.store.find(stage.kind, key)
        if artifact is None:
            hint = "every pool must see the same project folder and store: docs/operating.md"
            raise StageFailed("config", f"the stage was built in pool {stage.pool}, but is not in the store of this machine", hint)
        run.note(name, "done", artifact)
    return artifact


def _cached(run: RunContext, job: Job) -> Artifact | None:
    """Return the artifact from the store, unless the stage is forced.

    Writes it into the run's record under the store's shared lock, so that `tuneline gc` sees it as used.
    """
    if job.name in run.forced:
        earlier = run.workspace.runs.run_that_forced(run.pipeline, job.name, job.key, run.record.flow_run)
        if earlier is None:
            return None
        get_run_logger().info(f"`--force`: run {earlier}, which was stopped later, has rebuilt it already")
    with run.workspace.store.shared_lock():
        artifact = run.workspace.store.find(job.stage.kind, job.key)
        if artifact is not None:
            if (artifact.payload / REFERENCE).exists() and isinstance(job.stage, ModelStage) and job.stage.path:
                point(artifact.path, Path(job.resolved.files["path"][0]))
                require_key_content(run, job.stage, job.resolved)  # the files may have changed since the key was computed
            run.note(job.name, "cached", artifact)
    return artifact


@contextmanager
def _lock(run: RunContext, job: Job) -> Iterator[int]:
    """Hold the key's lock. Warns while another run holds it; raises StageStopped if this run is stopped."""

    def say() -> None:
        run.warn(job.name, "another run is building the same stage; waiting for it")

    try:
        with run.workspace.store.locked(job.key, say, lambda: not run.supervisor.stopping) as held:
            yield held
    except BlockingIOError:
        raise StageStopped from None


def _slot(run: RunContext, job: Job) -> AbstractContextManager[Taken]:
    """Acquire a run slot and the stage's GPUs. Warns while waiting for another stage."""
    holder = {"stage": f"{run.pipeline}/{job.name}", "run": run.record.run_id}
    resources = job.stage.resources
    say, keep_waiting = partial(run.warn, job.name), lambda: not run.supervisor.stopping
    return run.slots.taken(resources.gpus, resources.devices, holder, say, keep_waiting)


def _pass_gate(run: RunContext, name: str, stage: GateStage) -> Any:
    passed, lines = judge(stage, run.stages, run.manifests)
    logger = get_run_logger()
    for line in lines:
        logger.info(line)
    run.note(name, "done" if passed else "refused", message="\n".join(lines))
    return PASSED if passed else Failed(name="Refused", message="; ".join(line for line in lines if line.startswith("NOT")))
