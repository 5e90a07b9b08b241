"""Export a stage into a folder: run the program of the kind `export` beside that folder, without Prefect and without the store.

An earlier export is replaced only as a whole; its author's text under `Intended use` is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.run.export_target import replace, scratch_for
from flows.run.supervisor import Outcome, Program, Supervisor, program_environment
from tuneline.config.messages import translate
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.files import write_atomically
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.export import ExportStage
from tuneline.kinds.gate import GateStage
from tuneline.kinds.stage import Stage
from tuneline.planning.plan import PlanRow
from tuneline.planning.verdict import MET, judge
from tuneline.wording import listed, nearest
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.cards import author_text, is_export
from tuneline.workspace.file_names import BASE, CARD, EVENTS, FAILURE, LOG, PAYLOAD, REQUEST, RESULT
from tuneline.workspace.history import input_of, input_slots, manifests_in_history, names_in_history
from tuneline.workspace.protocol import Event, Failure, Request, Result
from tuneline.workspace.reference import REFERENCE, folder_of
from tuneline.workspace.runtimes import ready_runtime
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


def not_in_card(stages: Mapping[str, Stage], name: str, stage: ExportStage) -> list[str]:
    """Return the evaluations of a model named on the command line that its card lacks, as they are not built."""
    chosen = isinstance(stages[name], ExportStage)
    return [
        other
        for other, each in stages.items()
        if not chosen and isinstance(each, EvaluateStage) and each.model == stage.of and other not in stage.evaluations
    ]


def _option(field: object) -> str:
    return "--public" if field == "private" else f"--{str(field).replace('_', '-')}"


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
        hint = f"`tuneline run {pipeline} --only {name}`, or repeat the run's --set and --var"
        problems.append(Problem("", f"found no artifact of `{name}` ({why})", hint, place="export"))
    if problems:
        raise ConfigError(problems)
    return inputs


def refusals(stages: Mapping[str, Stage], rows: Sequence[PlanRow]) -> Iterator[tuple[str, str, str]]:
    """Yield the gate, the judged stage and the reason for each requirement that is not met, or, with no stage, cannot be judged yet."""
    built = {row.stage: row.artifact.manifest for row in rows if row.artifact is not None}
    for name, gate in stages.items():
        if isinstance(gate, GateStage):
            for requirement, line in zip(gate.require, judge(gate, stages, built)[1], strict=False):  # then notes
                missing = [stage for stage in (requirement.of, requirement.compared_with) if stage and stage not in built]
                if missing:
                    yield name, "", f"{' and '.join(missing)} must be built first"
                elif not line.startswith(MET):
                    yield name, requirement.of, line


def export(job: Job, on_line: Say, on_event: Callable[[Event], None]) -> Result:
    """Write the folder. Raises StageFailed; then the target is as it was."""
    with scratch_for(job.target) as scratch:
        request = _request(job, scratch)
        request.write(scratch / REQUEST)
        (scratch / EVENTS).touch()
        python = ready_runtime(job.stage.runtime, job.workspace.loaded.spec, job.workspace.root)
        command = [str(python.python), "-m", "tasks", str(scratch / REQUEST)]
        with job.workspace.store.shared_lock():
            outcome = Supervisor().run(Program(command, program_environment(scratch, []), scratch, job.stage.timeout), on_line, on_event)
        if outcome.status != 0 or not (scratch / RESULT).exists():
            raise _failure(scratch, outcome)
        result: Result = Result.read(scratch / RESULT)
        _finish(job, request.payload)
        replace(job.target, scratch, request.payload)
        return result


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
        config["base_model_name_or_path"] = str(job.target / BASE)
    elif (payload / REFERENCE).exists():
        config["base_model_name_or_path"] = str(folder_of(payload))
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
