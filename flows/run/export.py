"""Export a stage into a folder: run the program of the kind `export` beside that folder, without Prefect and without the store.

The program writes into a temporary folder on the same disk, which replaces the target by renames. An earlier export is replaced only as
a whole; its author's text under `Intended use` is kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.run.supervisor import Outcome, Program, Supervisor, program_environment
from tuneline.config.messages import translate
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.files import write_atomically
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.export import ExportStage
from tuneline.kinds.stage import Stage
from tuneline.planning.plan import PlanRow
from tuneline.wording import listed, nearest
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.cards import author_text, is_export
from tuneline.workspace.file_names import BASE, CARD, EVENTS, FAILURE, LOG, PAYLOAD, REQUEST, RESULT
from tuneline.workspace.history import input_of, input_slots, manifests_in_history, names_in_history
from tuneline.workspace.protocol import Event, Failure, Request, Result
from tuneline.workspace.reference import REFERENCE, folder_of
from tuneline.workspace.runtimes import find_runtime
from tuneline.workspace.workspace import Workspace

LOG_TAIL = 20  # lines shown of a program that ended without a reason
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """An export: its stage with the artifacts that it reads, and the folder that it writes."""

    workspace: Workspace
    pipeline: str
    stage: ExportStage
    inputs: Mapping[str, Artifact]
    target: Path
    with_sbom: bool = False


def export_stage(stages: Mapping[str, Stage], name: str, built: Mapping[str, Artifact], fields: Mapping[str, Any]) -> ExportStage:
    """Return the stage to run for a stage's name: the one of kind `export` of this name, or one that exports the named model.

    `fields`: those given on the command line. By default the card has the evaluations in the store (`built`) of the model and of its base.
    Raises ConfigError.
    """
    stage = stages.get(name)
    if stage is None:
        raise ConfigError([Problem("", f"found no stage `{name}`, expected {listed(stages)}", nearest(name, stages), place="export")])
    if isinstance(stage, ExportStage):
        document = {**stage.model_dump(exclude_unset=True), **fields}
    elif stage.output_type() in ("Model", "Adapter"):
        base = base_of(stages, name)
        about = [other for other, each in stages.items() if isinstance(each, EvaluateStage) and each.model in (name, base)]
        runtime = getattr(stages[base], "runtime", "torch")
        evaluations = [other for other in about if other in built]
        document = {"kind": "export", "of": name, "evaluations": evaluations, "runtime": runtime, **fields}
    else:
        found = f"found `{name}` of kind {stage.kind}, expected a model, an adapter, or a stage of kind export"
        raise ConfigError([Problem("", found, "name the stage that made the model", place="export")])
    try:
        made = ExportStage.model_validate(document)
    except ValidationError as error:
        found_all = translate(error, document)
        raise ConfigError([Problem("", message, hint, place=_option(path[0])) for path, _, message, hint in found_all]) from None
    if problems := [*made.problems(), *made.upstream_problems(stages)]:
        raise ConfigError([Problem("", each.message, each.hint, place=_option(each.field)) for each in problems])
    return made


def _option(field: object) -> str:
    return f"--{str(field).replace('_', '-')}"


def base_of(stages: Mapping[str, Stage], name: str) -> str:
    """Return the stage where the chain of models of a stage begins."""
    while (made_from := input_slots(stages[name]).get("model") or stages[name].made_from()) in stages:
        name = str(made_from)
    return name


def inputs_of(stage: ExportStage, rows: Sequence[PlanRow], pipeline: str) -> dict[str, Artifact]:
    """Return the artifacts that the current file names. Raises ConfigError for those that are not built."""
    known, inputs, problems = {row.stage: row for row in rows}, dict[str, Artifact](), list[Problem]()
    for slot, name in input_slots(stage).items():
        row = known[name]
        if row.artifact is not None:
            inputs[slot] = row.artifact
            continue
        why = "; ".join(reason.text for reason in row.reasons)
        problems.append(Problem("", f"found no artifact of `{name}` ({why})", f"`tuneline run {pipeline} --only {name}`", place="export"))
    if problems:
        raise ConfigError(problems)
    return inputs


def check_target(target: Path, force: bool) -> None:
    """Raises ConfigError unless the folder is missing, empty, an earlier export, or to be replaced by --force."""
    if target.exists() and not target.is_dir():
        raise ConfigError([Problem("", "found a file, expected a folder", "name another folder", place=str(target))])
    if not target.absolute().parent.is_dir():
        found = f"found no folder {target.absolute().parent}"
        raise ConfigError([Problem("", found, "create it", place=str(target))])
    if target.is_dir() and any(target.iterdir()) and not (force or is_export(target)):
        found = f"found a folder that is not empty and no earlier export (no {CARD} with the tag `tuneline`)"
        raise ConfigError([Problem("", found, "name another folder, or replace it by --force", place=str(target))])


def export(job: Job, on_line: Say, on_event: Callable[[Event], None]) -> Result:
    """Write the folder. Raises StageFailed; then the target is as it was."""
    target = job.target.absolute()
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        request = _request(job, scratch)
        request.write(scratch / REQUEST)
        (scratch / EVENTS).touch()
        python = find_runtime(job.stage.runtime, job.workspace.loaded.spec, job.workspace.root)
        if not python.ready:
            raise StageFailed("config", f"the runtime {python.name} is not set up", f"`tuneline setup {python.name}` builds it")
        command = [str(python.python), "-m", "tasks", str(scratch / REQUEST)]
        with job.workspace.store.shared_lock():
            outcome = Supervisor().run(Program(command, program_environment(scratch, []), scratch, job.stage.timeout), on_line, on_event)
        if outcome.status != 0 or not (scratch / RESULT).exists():
            raise _failure(scratch, outcome)
        result: Result = Result.read(scratch / RESULT)
        _finish(job, request.payload)
        _replace(target, request.payload)
        return result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _request(job: Job, scratch: Path) -> Request:
    stage, store, target = job.stage, job.workspace.store, job.target
    history = names_in_history(job.workspace.loaded.pipeline(job.pipeline).stages, stage, job.inputs)
    files = {}
    if job.with_sbom:
        from flows.run.sbom import bill_of_materials

        files["sbom"] = [scratch / "sbom.json"]
        files["sbom"][0].write_text(bill_of_materials(stage, history, manifests_in_history(history, store.root)), encoding="utf-8")
    if is_export(target) and (text := author_text((target / CARD).read_text(encoding="utf-8"))):
        files["intended"] = [scratch / "intended.md"]
        files["intended"][0].write_text(text, encoding="utf-8")
    return Request(
        kind=stage.kind,
        key="",
        config=stage.model_dump(mode="json"),
        seed=stage.seed,
        inputs={slot: input_of(store, artifact) for slot, artifact in job.inputs.items()},
        files=files,
        commits={},
        out=scratch / "out",
        work=scratch,
        attempt=1,
        resources=stage.resources.model_dump(mode="json"),
        history=history,
    )


def _failure(scratch: Path, outcome: Outcome) -> StageFailed:
    if (scratch / FAILURE).exists():
        known: Failure = Failure.read(scratch / FAILURE)
        details = f"\n\n{known.details}" if known.failure_class == "bug" else ""
        return StageFailed(known.failure_class, f"{known.failure_class}: {known.message}{details}", known.hint)
    tail = "\n".join((scratch / LOG).read_text(errors="replace").splitlines()[-LOG_TAIL:]) if (scratch / LOG).exists() else ""
    return StageFailed("bug", f"the program ended with status {outcome.status} without saying why; the end of its log:\n{tail}")


def _finish(job: Job, folder: Path) -> None:
    """Write where the base of an adapter is, which the program cannot know: beside it, or, if left out, the folder that was named."""
    file, base = folder / "adapter_config.json", job.inputs["of"].manifest.base
    config: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    if config.get("base_model_name_or_path") != BASE or base is None:
        return
    payload = job.workspace.store.folder(base.kind, base.key) / PAYLOAD
    if (folder / BASE).exists():
        config["base_model_name_or_path"] = str(job.target.absolute() / BASE)
    elif (payload / REFERENCE).exists():
        config["base_model_name_or_path"] = str(folder_of(payload))
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _replace(target: Path, folder: Path) -> None:
    """Put the folder in the target's place. `folder` is on the same disk."""
    if target.exists():
        target.rename(folder.parent / "earlier")
    folder.rename(target)
