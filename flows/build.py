"""One attempt at a stage: the request, the program under the watchdog, and what it made into the store.

The caller (`flows/stage.py`) holds the key's lock, a slot and the stage's GPUs. What a program's death means is `flows/attempts.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prefect import get_run_logger

from flows import node
from flows.attempts import Attempts
from flows.progress import ProgressArtifact
from flows.slots import Taken
from flows.supervisor import Outcome, program_environment
from flows.this_run import Run
from tuneline import disk
from tuneline.checkpoints import newest
from tuneline.data_sources import CodeSource
from tuneline.errors import StageFailed
from tuneline.fields import OutsideFile, annotated_values
from tuneline.plan import code_trees, hub_inputs
from tuneline.protocol import Event, Input, Request, Result, Tree
from tuneline.runtimes import RuntimeEnvironment, find_runtime
from tuneline.stages import ProgramStage
from tuneline.store import Artifact, Base, File, Manifest
from tuneline.workspace import Workspace

CHANGED_WHILE_READ = "files that the stage reads have changed since the run began"


def build(
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
        config=stage.model_dump(mode="json") | stage.decided(),
        seed=stage.seed,
        inputs={slot: _input(run.workspace, artifact) for slot, artifact in inputs.items()},
        files={path: run.workspace.outside(named, code.get(path))[0] for path, _, named in annotated_values(stage, OutsideFile)},
        trees={path: _tree(run.workspace, source) for path, source in code.items()},
        commits={path: run.commit(*wanted) for path, *wanted in hub_inputs(run.workspace, stage)},
        out=store.building(key),
        work=work,
        attempt=len(attempts.all) + 1,
        resources=stage.resources.model_copy(update={"micro_batch_size": micro_batch}).model_dump(mode="json"),
        engine=_runtime(run, engine).python if (engine := stage.engine_runtime()) else None,
        join=node.command(run.pipeline, run.workspace.loaded.file, run.workspace.loaded.overrides),
    )
    request.write(work / "request.json")
    seen = _as_in_key(run, stage, document, request)
    checkpoint = newest(work, key)
    if checkpoint and (refused := checkpoint.refused(stage.resources)):
        raise StageFailed("config", *refused)
    told = [f"attempt {request.attempt}"] if attempts.of_run(run.record.run_id) else []
    told += [f"resumes from step {checkpoint.step}"] if checkpoint else []
    run.reporter.started(name, ", ".join([stage.kind, *told]))
    began = datetime.now(UTC)
    outcome = _supervise(run, name, stage, request, held, taken)
    if outcome.stopped is None and outcome.status == 0 and (work / "result.json").exists():
        if _as_in_key(run, stage, document, request) != seen:
            raise StageFailed("data", CHANGED_WHILE_READ, "run again when nothing writes to them")
        try:
            artifact = _publish(run, stage, request, attempts, inputs, document, began)
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


def _runtime(run: Run, name: str) -> RuntimeEnvironment:
    runtime = find_runtime(name, run.workspace.loaded.spec, run.workspace.root)
    if not runtime.ready:
        raise StageFailed("config", f"the runtime {name} is not set up", f"`tuneline setup {name}` builds it")
    return runtime


def _supervise(run: Run, name: str, stage: ProgramStage, request: Request, held: int, taken: Taken) -> Outcome:
    runtime = _runtime(run, stage.runtime)
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

    # Only a training may have several, says the loader.
    command = [str(runtime.python), "-m", "tasks.launch" if stage.launched() else "tasks", str(request.work / "request.json")]
    try:
        environment, locks = program_environment(request.work, taken.gpus), (held, *taken.descriptors)
        return run.supervisor.run(command, environment, request.work, stage.timeout, locks, on_line, on_event)
    finally:
        progress.close()


def _publish(
    run: Run,
    stage: ProgramStage,
    request: Request,
    attempts: Attempts,
    inputs: Mapping[str, Artifact],
    document: dict[str, Any],
    began: datetime,
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
        "failed": [attempt["class"] for attempt in attempts.all],
        "micro_batch_size": request.resources["micro_batch_size"],
    }

    def manifest(payload_digest: str, files: tuple[File, ...]) -> Manifest:
        return Manifest(
            kind=stage.kind,
            type=stage.gives(),
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
    if stage.gives() != "Adapter":
        return None
    model = inputs["model"].manifest
    return Base(kind=model.kind, key=model.key, digest=model.digest, template=model.template)
