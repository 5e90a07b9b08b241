"""Make one attempt at a stage: write the request, run the program under the watchdog, publish its output to the store.

The caller (`flows/run/stage.py`) holds the key's lock, a slot and the stage's GPUs. `flows/run/attempts.py` classifies failures.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect import get_run_logger

from flows.report.progress import ProgressArtifact
from flows.run import forced, node
from flows.run.attempts import Attempts
from flows.run.run_context import RunContext
from flows.run.slots import Taken
from flows.run.supervisor import Outcome, Program, program_environment
from tuneline import disk
from tuneline.errors import ConfigError, StageFailed
from tuneline.kinds.stage import ProgramStage
from tuneline.kinds.trackers import Track
from tuneline.paths import resolve_path
from tuneline.planning.inputs import ResolvedInputs
from tuneline.workspace.artifact import Artifact, Base, File, Manifest
from tuneline.workspace.checkpoints import newest
from tuneline.workspace.file_names import ATTEMPTS, EVENTS, FAILURE, LOG, REQUEST, RESULT
from tuneline.workspace.history import input_of
from tuneline.workspace.protocol import Event, Request, Result
from tuneline.workspace.runtimes import RuntimeEnvironment, ready_runtime
from tuneline.workspace.tracked import tracked

CHANGED_WHILE_READ = "files that the stage reads have changed since the run began"
TOUCHED_WHILE_READ = "files that the stage reads were written to while its program ran, with the same content in the end"


@dataclass(frozen=True)
class Job:
    """A stage with everything that its key was computed from."""

    name: str
    stage: ProgramStage
    inputs: Mapping[str, Artifact]
    resolved: ResolvedInputs
    document: dict[str, Any]
    key: str


def build(run: RunContext, job: Job, held: int, taken: Taken) -> Artifact:
    """Run the program and publish its output. The caller holds the key's lock."""
    attempts = _prepare(run, job)
    resolved = require_key_content(run, job.stage, job.resolved)
    request = _request(run, job, resolved, attempts)
    request.write(request.work / REQUEST)
    checkpoint = newest(request.work, job.key)
    if checkpoint and (refused := checkpoint.refused(job.stage.resources)):
        raise StageFailed("config", *refused)
    details = [f"attempt {request.attempt}"] if attempts.of_run(run.record.run_id) else []
    details += [f"resumes from step {checkpoint.step}"] if checkpoint else []
    run.reporter.started(job.name, ", ".join([job.stage.kind, *details]))
    began = datetime.now(UTC)
    outcome = _supervise(run, job, request, held, taken)
    if outcome.stopped is not None or outcome.status != 0 or not (request.work / RESULT).exists():
        raise _failure(run, job, request, attempts, outcome)
    try:
        if require_key_content(run, job.stage, resolved).facts != resolved.facts:
            raise StageFailed("transient", TOUCHED_WHILE_READ, "the stage is retried automatically, as it may have read other content")
        _require_same_inputs(run, job)
        artifact = _publish(run, job, request, attempts, began)
    except OSError as error:
        if error.errno in disk.NUMBERS:
            raise disk.of_flow(error, request.out) from error  # reads the free space before `out` is deleted
        raise
    finally:
        shutil.rmtree(request.out, ignore_errors=True)
    shutil.rmtree(request.work, ignore_errors=True)
    return artifact


def _prepare(run: RunContext, job: Job) -> Attempts:
    """Make the work folder ready for an attempt. Return the earlier ones."""
    work = run.workspace.work(job.key)
    if job.name in run.forced:
        forced.begin(work, run.record, tried=bool(Attempts(work / ATTEMPTS).of_run(run.record.run_id)))
    work.mkdir(parents=True, exist_ok=True)
    for stale in (RESULT, FAILURE):
        (work / stale).unlink(missing_ok=True)
    return Attempts(work / ATTEMPTS)


def _request(run: RunContext, job: Job, resolved: ResolvedInputs, attempts: Attempts) -> Request:
    stage = job.stage
    return Request(
        kind=stage.kind,
        key=job.key,
        config=stage.model_dump(mode="json") | stage.decided(),
        seed=stage.seed,
        inputs={slot: input_of(run.workspace.store, artifact) for slot, artifact in job.inputs.items()},
        files=resolved.files,
        trees=resolved.trees,
        commits=resolved.commits,
        out=run.workspace.store.staging_dir(job.key),
        work=run.workspace.work(job.key),
        attempt=len(attempts.all) + 1,
        resources=stage.resources.model_copy(update={"micro_batch_size": attempts.micro_batch(stage)}).model_dump(mode="json"),
        engine=_runtime(run, engine).python if (engine := stage.engine_runtime()) else None,
        history=job.document.get("history", {}),
        name=f"{run.pipeline}/{job.name}/{run.record.run_id}",
        track=_track(run) if stage.trains else None,
        join=node.command(run.pipeline, run.workspace.loaded.file, run.workspace.loaded.overrides),
    )


def _failure(run: RunContext, job: Job, request: Request, attempts: Attempts, outcome: Outcome) -> StageFailed:
    """Record the failed attempt and return its failure. Deletes the unfinished output."""
    work, micro_batch = request.work, request.resources["micro_batch_size"]
    # A full disk can keep a program from writing its failure. Checked before the program's files are deleted.
    unreported = disk.full(request.out, work) if disk.is_full(request.out, work) else None
    shutil.rmtree(request.out, ignore_errors=True)
    if unreported and not outcome.stopped and not (work / FAILURE).exists():
        return unreported
    if outcome.stopped != "cancelled":
        forced.failed(work)
        run.warn(job.name, f"its log is {work / LOG}")
    return attempts.failed(run.record.run_id, job.stage, micro_batch, outcome, work)


def _track(run: RunContext) -> Track | None:
    """Return the pipeline's trackers, with absolute folders."""
    track = run.workspace.loaded.pipeline(run.pipeline).track
    if track is None or track.tensorboard is None:
        return track
    folder = str(resolve_path(run.workspace.root, track.tensorboard.log_dir))
    return track.model_copy(update={"tensorboard": track.tensorboard.model_copy(update={"log_dir": folder})})


def require_key_content(run: RunContext, stage: ProgramStage, resolved: ResolvedInputs) -> ResolvedInputs:
    """Return the current outside files. Raises StageFailed(data) if their content differs from what the key was computed from.

    A program reads files long after they were hashed for the key, at times that we do not know. So this is called before the program
    starts and after it has ended, and the `facts` of both calls are compared. If they are equal, no file was written to in between
    (`tuneline.trees.file_memory` says when a stat proves that), so the program read what was hashed. If the content is equal but the facts
    differ, somebody wrote other bytes and then the same ones again, as `git checkout` of another branch and back does. The program may
    have read either: nothing is stored, and the stage is retried.
    """
    if resolved.unchanged():
        return resolved
    try:
        now = run.resolve(stage)
    except ConfigError:  # a file is gone
        raise StageFailed("data", CHANGED_WHILE_READ, "run again when nothing writes to them") from None
    if now.digests != resolved.digests:
        raise StageFailed("data", CHANGED_WHILE_READ, "run again when nothing writes to them")
    return now


def _runtime(run: RunContext, name: str) -> RuntimeEnvironment:
    return ready_runtime(name, run.workspace.loaded.spec, run.workspace.root)


def _supervise(run: RunContext, job: Job, request: Request, held: int, taken: Taken) -> Outcome:
    name, stage = job.name, job.stage
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

    # The loader allows several processes only for trainings and evaluations.
    command = [str(runtime.python), "-m", "tasks.launch" if stage.launched() else "tasks", str(request.work / REQUEST)]
    try:
        environment, locks = program_environment(request.work, taken.gpus), (held, *taken.descriptors)
        return run.supervisor.run(Program(command, environment, request.work, stage.timeout, locks), on_line, on_event)
    finally:
        progress.close()


def _require_same_inputs(run: RunContext, job: Job) -> None:
    """Raises StageFailed(transient) if `--force` of another run has replaced an input while the program read it."""
    for slot, artifact in job.inputs.items():
        _, now = run.workspace.store.inspect(artifact.path)
        if now is None or now.digest != artifact.digest:
            message = f"{slot}: another run replaced {artifact.manifest.kind}/{artifact.key[:12]} while the stage read it"
            raise StageFailed("transient", message, "run again")


def _publish(run: RunContext, job: Job, request: Request, attempts: Attempts, began: datetime) -> Artifact:
    result: Result = Result.read(request.work / RESULT)
    links = tracked(request.work).links
    for name in (LOG, EVENTS):
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
            kind=job.stage.kind,
            type=job.stage.output_type(),
            key=job.key,
            document=job.document,
            digest=payload_digest,
            files=files,
            parents={slot: f"{artifact.manifest.kind}/{artifact.key}" for slot, artifact in job.inputs.items()},
            base=_base(job.stage, job.inputs),
            template=result.info.get("template"),
            metrics=result.metrics,
            info=result.info | ({"trackers": links} if links else {}),
            host=host,
        )

    return run.workspace.store.publish(request.out, manifest)


def _base(stage: ProgramStage, inputs: Mapping[str, Artifact]) -> Base | None:
    if stage.output_type() != "Adapter":
        return None
    model = inputs["model"].manifest
    return Base(kind=model.kind, key=model.key, digest=model.digest, template=model.template)
