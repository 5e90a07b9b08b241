"""The one Prefect task: finds or makes the artifact of a stage.

    needs succeeded? -> key -> in the store? -> lock -> in the store now? -> a slot -> program under the watchdog -> publish

Prefect's own cache is off: there is one cache, the store. What a program's death means, and whether it is tried again, is
decided by failure class (`flows/attempts.py`), not by exception type.
"""

from __future__ import annotations

import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State, TaskRun
from prefect.context import TaskRunContext
from prefect.runtime import task_run
from prefect.states import Completed, Failed

from flows.artifacts import Publisher
from flows.attempts import Attempts
from flows.child import build_in_pool
from flows.hub import resolve_commit
from flows.progress import ProgressArtifact
from flows.report_markdown import stage_report
from flows.slots import Slots, Taken
from flows.supervisor import Outcome, Supervisor
from tuneline import disk
from tuneline.data_sources import CodeSource
from tuneline.errors import StageFailed, StoreError, TunelineError
from tuneline.fields import OutsideFile, annotated_values
from tuneline.gate import judge, shown_metrics
from tuneline.keys import key_of
from tuneline.plan import code_trees, document_of, hub_inputs, input_slots
from tuneline.protocol import Event, Input, Request, Result, Tree
from tuneline.reference import REFERENCE, point
from tuneline.runs import RunRecord, StageRecord, StageStatus
from tuneline.runtimes import PACKAGES_ROOT, find_runtime
from tuneline.spec import GateStage, ModelStage, ProgramStage, Stage
from tuneline.store import Artifact, Base, File, Manifest
from tuneline.workspace import Workspace

PASSED = "passed"  # what a gate hands on
FAILED = "Failed: "  # a state's name, before the class of the failure
RETRY_DELAYS = [2.0, 15.0, 60.0, 300.0]  # seconds, by attempt; the last one repeats
CHANGED_WHILE_READ = "files that the stage reads have changed since the run began"


class Reporter(Protocol):
    """Who watches a run: the terminal, or nobody."""

    def began(self, run_id: str, page: str | None) -> None: ...
    def started(self, stage: str, message: str) -> None: ...
    def progress(self, stage: str, event: Event) -> None: ...
    def line(self, stage: str, line: str) -> None: ...
    def warning(self, stage: str, message: str) -> None: ...
    def finished(self, stage: str, record: StageRecord) -> None: ...


@dataclass(frozen=True)
class NoReporter:
    """Under a worker nobody looks at a terminal; Prefect has the log."""

    def began(self, run_id: str, page: str | None) -> None: ...
    def started(self, stage: str, message: str) -> None: ...
    def progress(self, stage: str, event: Event) -> None: ...
    def line(self, stage: str, line: str) -> None: ...
    def warning(self, stage: str, message: str) -> None: ...
    def finished(self, stage: str, record: StageRecord) -> None: ...


@dataclass
class Run:
    """What the stages of one run share."""

    workspace: Workspace
    pipeline: str
    record: RunRecord
    supervisor: Supervisor
    slots: Slots
    reporter: Reporter
    publisher: Publisher
    forced: frozenset[str] = frozenset()
    parameters: dict[str, Any] | None = None
    """What the flow was called with, where it runs in a pool: then stages with a pool of their own run there."""
    child_of: str | None = None
    """In a child: the key that its parent asked for. The run's record is the parent's."""
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """By stage, as people name them."""
    keys: dict[str, str] = field(default_factory=dict)
    """Of the stages that came to have one: what a failed one left is under it in the work folder."""
    _commits: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _commits_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stages(self) -> Mapping[str, Stage]:
        return self.workspace.loaded.spec.pipelines[self.pipeline].stages

    def commit(self, repository_type: str, repository: str, revision: str) -> str:
        """The same commit for every stage of the run."""
        with self._commits_lock:
            wanted = (repository_type, repository, revision)
            if wanted not in self._commits:
                self._commits[wanted] = resolve_commit(*wanted)
            return self._commits[wanted]

    def know_commits(self, commits: list[list[str]]) -> None:
        """Of a parent: [repository type, repository, revision, commit]."""
        self._commits |= {(kind, repository, revision): commit for kind, repository, revision, commit in commits}

    def warn(self, name: str, message: str) -> None:
        get_run_logger().warning(message)
        self.reporter.warning(name, message)

    def note(self, name: str, status: StageStatus, seconds: float = 0.0, artifact: Artifact | None = None, message: str = "") -> None:
        """Keeps how a stage ended, in the record on disk as well."""
        stage = self.stages[name]
        record = StageRecord(stage=name, kind=stage.kind, status=status, seconds=round(seconds, 1), message=message)
        if artifact:
            manifest = artifact.manifest
            record.key, record.digest, record.document = manifest.key, manifest.digest, manifest.document
            record.artifact, record.metrics = str(artifact.path), shown_metrics(stage, manifest.metrics)
        with self._lock:
            self.metrics[name] = record.metrics
            self.record.stages = [other for other in self.record.stages if other.stage != name] + [record]
            if self.child_of is None:
                self.workspace.runs.save(self.record)
        self.reporter.finished(name, record)
        if status != "skipped":
            planned = next(plan for plan in self.record.planned if plan.stage == name)
            log = self.workspace.work(self.keys[name]) / "log.txt" if status == "failed" and name in self.keys else None
            about = stage.description or f"{name}, {stage.kind} of {self.pipeline}: {status}"
            self.publisher.markdown(f"stage-{self.pipeline}-{name}", lambda: stage_report(planned, record, log), about)


def stage_task(run: Run, name: str) -> Task[[dict[str, Any]], Any]:
    """The Prefect task of one stage. Its parameter: what each stage that it depends on handed on."""
    stage = run.stages[name]

    def stopped_or_final(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
        return not run.supervisor.stopping and _retryable(state)

    @task(
        name=name,
        task_run_name=name,
        description=stage.description or f"{stage.kind} of {run.pipeline}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=stage.retries,
        retry_delay_seconds=0,  # we wait ourselves, so that a stop ends the wait
        retry_condition_fn=stopped_or_final,
    )
    def supervise(needs: dict[str, Any]) -> Any:
        started = time.monotonic()
        # Told with the state in which the stage ends: a tag from the start is a limit that the server is asked about, and a stage
        # must start while the server is away.
        TaskRunContext.get().task_run.tags = [stage.kind]  # type: ignore[union-attr]
        if task_run.run_count > 1:
            run.supervisor.pause(RETRY_DELAYS[min(task_run.run_count - 2, len(RETRY_DELAYS) - 1)])
        try:
            return _carry_out(run, name, stage, needs)
        except StageFailed as error:
            if error.retryable and task_run.run_count <= stage.retries and not run.supervisor.stopping:
                run.warn(name, f"{error.failure_class}: {error.message} ({error.hint})")
                raise
            return _failed(run, name, error, time.monotonic() - started)
        except Exception as error:
            if failure := _of_store(run, error):
                return _failed(run, name, failure, time.monotonic() - started)
            message = str(error) if isinstance(error, TunelineError) else f"{type(error).__name__}: {error}"
            run.note(name, "failed", time.monotonic() - started, message=message)
            raise

    return supervise


def _failed(run: Run, name: str, error: StageFailed, seconds: float) -> State[Any]:
    """The state of a stage that is not tried again, named by its class."""
    details = f"\n{error.details}" if error.failure_class == "bug" else ""
    get_run_logger().error(f"{error.failure_class}: {error}{details}")
    run.note(name, "failed", seconds, message=f"{error.failure_class}: {error}{details}")
    return Failed(name=f"{FAILED}{error.failure_class}", message=str(error))


def _of_store(run: Run, error: Exception) -> StageFailed | None:
    """What a full or broken disk, or a store that cannot be used, means to the stage."""
    if isinstance(error, StoreError):
        return StageFailed("disk" if disk.is_of_disk(error) else "config", error.message, error.hint)
    if isinstance(error, OSError) and error.errno in disk.NUMBERS:
        return disk.of_flow(error, run.workspace.home)
    return None


def _retryable(state: State[Any]) -> bool:
    return isinstance(state.data, StageFailed) and state.data.retryable


def _carry_out(run: Run, name: str, stage: Stage, needs: dict[str, Any]) -> Any:
    absent = [need for need, value in needs.items() if value is None or isinstance(value, BaseException)]
    if absent:
        message = f"needs {', '.join(absent)}"
        run.note(name, "skipped", message=message)
        return Completed(name="Skipped", message=message)
    if isinstance(stage, GateStage):
        return _pass_gate(run, name, stage)
    assert isinstance(stage, ProgramStage)
    inputs = {slot: needs[other] for slot, other in input_slots(stage).items()}
    salt = run.workspace.loaded.spec.pipelines[run.pipeline].salt
    document, _ = document_of(run.workspace, stage, inputs, salt, run.commit)
    key = run.keys[name] = key_of(document)
    if run.child_of not in (None, key):
        found = f"found the key {key[:12]}, but the run that asked for the stage computes {(run.child_of or '')[:12]}"
        raise StageFailed("config", found, "both must see the same files and be of the same version of tuneline: docs/operating.md")
    artifact = _cached(run, name, stage, key)
    if artifact is None and run.parameters is not None and stage.pool not in (None, run.workspace.loaded.spec.pipelines[run.pipeline].pool):
        return _build_elsewhere(run, name, stage, inputs, key)
    if artifact is None:
        with _lock(run, name, key) as held:
            artifact = _cached(run, name, stage, key)
            if artifact is None:
                with _slot(run, name, stage) as taken:
                    started = time.monotonic()
                    artifact = _build(run, name, stage, inputs, document, key, held, taken)
                run.note(name, "done", time.monotonic() - started, artifact)
                return artifact
    return Completed(name="Cached", message=f"{stage.kind}/{key[:12]} is in the store", data=artifact)


def _build_elsewhere(run: Run, name: str, stage: ProgramStage, inputs: Mapping[str, Artifact], key: str) -> Artifact:
    """In the stage's own pool, by a child run."""
    started = time.monotonic()
    wanted = {**(run.parameters or {}), "key": key, "run_id": run.record.run_id, "forced": name in run.forced}
    wanted["commits"] = [[*known, run.commit(*known)] for _, *known in hub_inputs(stage)]
    run.reporter.started(name, f"{stage.kind} in pool {stage.pool}")
    build_in_pool(name, stage, inputs, wanted, run.supervisor)
    with run.workspace.store.steady():
        artifact = run.workspace.store.find(stage.kind, key)
        if artifact is None:
            hint = "every pool must see the same project folder and store: docs/operating.md"
            raise StageFailed("config", f"the stage was built in pool {stage.pool}, but is not in the store of this machine", hint)
        run.note(name, "done", time.monotonic() - started, artifact)
    return artifact


def _cached(run: Run, name: str, stage: ProgramStage, key: str) -> Artifact | None:
    """What the store has, unless the stage is forced; it is in the run's record before `tuneline gc` can look there."""
    if name in run.forced:
        return None
    with run.workspace.store.steady():
        artifact = run.workspace.store.find(stage.kind, key)
        if artifact is not None:
            if (artifact.payload / REFERENCE).exists() and isinstance(stage, ModelStage) and stage.path:
                point(artifact.path, run.workspace.outside(stage.path)[0][0])
            run.note(name, "cached", artifact=artifact)
    return artifact


@contextmanager
def _lock(run: Run, name: str, key: str) -> Iterator[int]:
    """The key's lock; whoever waits for another run says so, and stops waiting when its own run stops."""

    def say() -> None:
        run.warn(name, "another run is building the same stage; waiting for it")

    try:
        with run.workspace.store.locked(key, say, lambda: not run.supervisor.stopping) as held:
            yield held
    except BlockingIOError:
        raise StageFailed("transient", "stopped with the run", final=True) from None


def _slot(run: Run, name: str, stage: ProgramStage) -> AbstractContextManager[Taken]:
    """A slot of the run and the stage's GPUs; whoever waits for another stage's says so."""
    holder = {"stage": f"{run.pipeline}/{name}", "run": run.record.run_id}
    resources = stage.resources
    say, going_on = partial(run.warn, name), lambda: not run.supervisor.stopping
    return run.slots.taken(resources.gpus, resources.devices, holder, say, going_on)


def _pass_gate(run: Run, name: str, stage: GateStage) -> Any:
    passed, lines = judge(stage, run.metrics)
    logger = get_run_logger()
    for line in lines:
        logger.info(line)
    run.note(name, "done" if passed else "refused", message="\n".join(lines))
    return PASSED if passed else Failed(name="Refused", message="; ".join(line for line in lines if line.startswith("NOT")))


# --- one attempt --------------------------------------------------------------------------------------------------------


def _build(
    run: Run,
    name: str,
    stage: ProgramStage,
    inputs: Mapping[str, Artifact],
    document: dict[str, Any],
    key: str,
    held: int,
    taken: Taken,
) -> Artifact:
    """Runs the program and publishes what it made. The caller holds the key's lock."""
    work, store = run.workspace.work(key), run.workspace.store
    attempts = Attempts(work / "attempts.json")
    if name in run.forced and not attempts.of_run(run.record.run_id):
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    for stale in ("result.json", "failure.json"):
        (work / stale).unlink(missing_ok=True)
    micro_batch = attempts.micro_batch(stage)
    code = code_trees(stage)
    request = Request(
        kind=stage.kind,
        key=key,
        config=stage.model_dump(mode="json"),
        seed=stage.seed,
        inputs={slot: _input(run.workspace, artifact) for slot, artifact in inputs.items()},
        files={path: run.workspace.outside(named, code.get(path))[0] for path, _, named in annotated_values(stage, OutsideFile)},
        trees={path: _tree(run.workspace, source) for path, source in code.items()},
        commits={path: run.commit(*wanted) for path, *wanted in hub_inputs(stage)},
        out=store.building(key),
        work=work,
        attempt=len(attempts.all) + 1,
        resources=stage.resources.model_copy(update={"micro_batch_size": micro_batch}).model_dump(mode="json"),
    )
    request.write(work / "request.json")
    seen = _as_in_key(run, stage, document, request)
    run.reporter.started(name, f"{stage.kind}, attempt {request.attempt}" if attempts.of_run(run.record.run_id) else stage.kind)
    began = datetime.now(UTC)
    outcome = _supervise(run, name, stage, request, held, taken)
    if outcome.stopped is None and outcome.status == 0 and (work / "result.json").exists():
        if _as_in_key(run, stage, document, request) != seen:
            raise StageFailed("data", CHANGED_WHILE_READ, "run again when nothing writes to them")
        try:
            artifact = _publish(run, stage, request, inputs, document, began)
        except OSError as error:
            if error.errno in disk.NUMBERS:
                raise disk.of_flow(error, request.out) from error  # what is free is looked at before what was written is gone
            raise
        finally:
            shutil.rmtree(request.out, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        return artifact
    # A full disk can keep a program from saying so. It is looked at before what the program wrote is gone.
    unsaid = disk.full(request.out, work) if disk.is_full(request.out, work) else None
    shutil.rmtree(request.out, ignore_errors=True)
    if unsaid and not outcome.stopped and not (work / "failure.json").exists():
        raise unsaid
    if outcome.stopped != "cancelled":
        run.warn(name, f"its log is {work / 'log.txt'}")
    raise attempts.failed(run.record.run_id, stage, micro_batch, outcome, work)


def _as_in_key(run: Run, stage: ProgramStage, document: dict[str, Any], request: Request) -> list[tuple[int, int, int]]:
    """Size, time and inode of every outside file. Raises StageFailed(data) where its content is no longer what the key says."""
    code = code_trees(stage)
    for path, _, named in annotated_values(stage, OutsideFile):
        if run.workspace.outside(named, code.get(path))[1] != document["files"][path]:
            raise StageFailed("data", CHANGED_WHILE_READ, "run again when nothing writes to them")
    paths = [path for paths in request.files.values() for path in paths]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
    return [(status.st_size, status.st_mtime_ns, status.st_ino) for status in (file.stat() for file in files)]


def _tree(workspace: Workspace, source: CodeSource) -> Tree:
    selection = workspace.selected(source.path, source)
    return Tree(folder=selection.folder, left_out=selection.left_out)


def _input(workspace: Workspace, artifact: Artifact) -> Input:
    manifest = artifact.manifest
    base = None
    if manifest.base:
        found = workspace.store.find(manifest.base.kind, manifest.base.key)
        if found is None:
            hint = f"force it again: `--force {manifest.base.kind}`'s stage"
            raise StageFailed("data", f"the base model of an adapter, {manifest.base.kind}/{manifest.base.key[:12]}, left the store", hint)
        base = _input(workspace, found)
    return Input(path=artifact.payload, digest=manifest.digest, type=manifest.type, template=manifest.template, base=base)


def _supervise(run: Run, name: str, stage: ProgramStage, request: Request, held: int, taken: Taken) -> Outcome:
    runtime = find_runtime(stage.runtime, run.workspace.loaded.spec, run.workspace.root)
    if not runtime.ready:
        raise StageFailed("config", f"the runtime {runtime.name} is not set up", f"`tuneline setup {runtime.name}` builds it")
    logger, progress = get_run_logger(), ProgressArtifact(name)

    def on_line(line: str) -> None:
        logger.info(line)
        run.reporter.line(name, line)

    def on_event(event: Event) -> None:
        if event.type == "warning" and event.message:
            run.warn(name, event.message)
        else:
            progress.show(event)
        if event.type == "progress":
            run.reporter.progress(name, event)

    launcher = ["-m", "tasks"]
    if stage.resources.world_size > 1:  # only a training may have several, says the loader
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stage.resources.world_size}", *launcher]
    command = [str(runtime.python), *launcher, str(request.work / "request.json")]
    try:
        environment, locks = _environment(request.work, taken.gpus), (held, *taken.descriptors)
        return run.supervisor.run(command, environment, request.work, stage.timeout, locks, on_line, on_event)
    finally:
        progress.close()


def _environment(work: Path, gpus: list[str]) -> dict[str, str]:
    """The flow's own, less what is Prefect's, so that no program can talk to the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return kept | {
        "PYTHONPATH": str(PACKAGES_ROOT),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # some generators of reasoning-gym go by set order
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # a spinning thread starves whoever shares the core: trainings stalled
        "HF_MODULES_CACHE": str(work / "modules"),  # where transformers copies a model's own code to before it runs it
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
    }


def _publish(
    run: Run, stage: ProgramStage, request: Request, inputs: Mapping[str, Artifact], document: dict[str, Any], began: datetime
) -> Artifact:
    result: Result = Result.read(request.work / "result.json")
    for name in ("log.txt", "events.jsonl"):
        shutil.copy(request.work / name, request.meta / name)
    host = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "started": began.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "attempts": request.attempt,
        "micro_batch_size": request.resources["micro_batch_size"],
    }

    def manifest(payload_digest: str, files: tuple[File, ...]) -> Manifest:
        return Manifest(
            kind=stage.kind,
            type=stage.gives,
            key=request.key,
            document=document,
            digest=payload_digest,
            files=files,
            parents={slot: f"{artifact.manifest.kind}/{artifact.key}" for slot, artifact in inputs.items()},
            base=_base(stage, inputs),
            template=result.info.get("template"),
            metrics=result.metrics,
            info=result.info,
            host=host,
        )

    return run.workspace.store.publish(request.out, manifest)


def _base(stage: ProgramStage, inputs: Mapping[str, Artifact]) -> Base | None:
    if stage.gives != "Adapter":
        return None
    model = inputs["model"].manifest
    return Base(kind=model.kind, key=model.key, digest=model.digest, template=model.template)
