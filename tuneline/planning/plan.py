"""Plan a run: for every stage its key, whether its artifact exists, and the reasons if it does not.

Planning reads the store and the run records. It uses no network (unless the workspace's hub does) and no clock, and changes nothing
but the memory of files. A run uses the same `resolve` and `document_of` once every input exists, so a plan and a run always agree
about a key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from tuneline.canonical import key_of
from tuneline.config.load import Loaded
from tuneline.config.order import in_order, with_ancestors
from tuneline.config.spec import Pipeline
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.kinds.stage import ProgramStage, Stage
from tuneline.kinds.training import Training
from tuneline.paths import PACKAGES_ROOT
from tuneline.planning.inputs import ResolvedInputs, benchmark_data, hub_inputs, resolve
from tuneline.planning.keys import Outside, key_document
from tuneline.wording import listed, nearest
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.benchmarks import NOT_SET_UP
from tuneline.workspace.checkpoints import Checkpoint, newest
from tuneline.workspace.history import input_slots, names_in_history
from tuneline.workspace.runs import StageRecord
from tuneline.workspace.workspace import Workspace

Status = Literal["cached", "run", "run or cached", "unknown"]
ReasonCode = Literal["config", "input", "code", "library", "file", "missing", "corrupt", "forced", "never_ran"]


@dataclass(frozen=True)
class Reason:
    code: ReasonCode
    text: str
    path: str = ""
    old: Any = None
    new: Any = None


NEVER = Reason("never_ran", "no run has completed it")


@dataclass
class PlanRow:
    stage: str
    kind: str
    status: Status
    """`run or cached`: only an input is built first. If it gets the digest that it had, the stage is cached."""
    reasons: list[Reason] = field(default_factory=list)
    key: str | None = None
    document: dict[str, Any] | None = None
    artifact: Artifact | None = None
    checkpoint: Checkpoint | None = None
    """Checkpoint that an unfinished training resumes from."""
    refused: tuple[str, str] | None = None
    """(message, hint) if the training cannot resume with its current resources."""
    problems: list[Problem] = field(default_factory=list)


def check_stages(loaded: Loaded, pipeline_name: str, only: str | None, force: Sequence[str]) -> None:
    """Raise ConfigError if --only or --force names an unknown stage."""
    pipeline = loaded.pipeline(pipeline_name)
    problems = []
    for flag, name in [("--only", only), *(("--force", name) for name in force)]:
        if name is not None and name not in pipeline.stages:
            found = f"found no stage `{name}` in {pipeline_name}, expected {listed(pipeline.stages)}"
            problems.append(Problem("", found, nearest(name, pipeline.stages), place=flag))
    if problems:
        raise ConfigError(problems)


def plan(workspace: Workspace, pipeline_name: str, only: str | None = None, force: tuple[str, ...] = ()) -> list[PlanRow]:
    """Return rows in execution order. Raises ConfigError for an unknown pipeline or stage name."""
    loaded = workspace.loaded
    check_stages(loaded, pipeline_name, only, force)
    pipeline = loaded.pipeline(pipeline_name)
    wanted = with_ancestors(pipeline, only) if only else set(pipeline.stages)
    earlier = workspace.runs.last_success(pipeline_name, wanted)
    rows: dict[str, PlanRow] = {}
    try:
        for name in in_order(pipeline):
            if name in wanted:
                rows[name] = _row(workspace, pipeline_name, name, rows, earlier.get(name), name in force)
    finally:
        workspace.memory.save()
    return list(rows.values())


def _row(
    workspace: Workspace, pipeline_name: str, name: str, rows: Mapping[str, PlanRow], earlier: StageRecord | None, forced: bool
) -> PlanRow:
    pipeline = workspace.loaded.spec.pipelines[pipeline_name]
    stage = pipeline.stages[name]
    row = PlanRow(name, stage.kind, "run")
    if not isinstance(stage, ProgramStage):
        return row
    slots = input_slots(stage)
    inputs = {slot: rows[other].artifact for slot, other in slots.items()}
    known = {slot: artifact for slot, artifact in inputs.items() if artifact is not None}
    code: ReasonCode = "input"
    problems = tuple(_unanswered(workspace, stage))
    if not problems:
        try:
            resolved = resolve(workspace, stage, workspace.hub.commit)
        except ConfigError as error:
            code, problems = "file", error.problems
    if problems:
        row.problems = [workspace.loaded.placed(problem, pipeline_name, name) for problem in problems]
        row.status, row.reasons = "unknown", [Reason(code, problem.message, problem.field) for problem in row.problems]
        return row
    document = document_of(stage, known, resolved, pipeline)
    waiting = [slot for slot in slots if slot not in known]
    if forced and not waiting and (other := workspace.runs.run_that_forced(pipeline_name, name, key_of(document))):
        row.reasons.append(Reason("forced", f"already rebuilt by run {other}, which was stopped later"))
        forced = False
    if forced:
        row.reasons.append(Reason("forced", "requested by --force"))
    row.reasons += [Reason("input", f"{slots[slot]} is built first", slot) for slot in waiting]
    if waiting or resolved.unresolved:
        what_is_unknown = any(rows[slots[slot]].status == "unknown" for slot in waiting) or bool(resolved.unresolved)
        looked_up = "is looked up on the hub when a run starts"
        row.reasons += [Reason("input", f"{repository} {looked_up}", path) for path, repository in resolved.unresolved.items()]
        others = list(_compared(earlier, document, slots, set(waiting))) if earlier else [NEVER]
        row.reasons += others
        if what_is_unknown:
            row.status = "unknown"
        elif not others and not forced:
            row.status = "run or cached"
        return row
    row.key, row.document = key_of(document), document
    if not forced:
        row.reasons += _look_up(workspace, stage, row, earlier)
    return row


def _look_up(workspace: Workspace, stage: ProgramStage, row: PlanRow, earlier: StageRecord | None) -> list[Reason]:
    """Look up the row's key in the store. Return why there is no artifact, and note the checkpoint that the stage resumes from."""
    assert row.key
    assert row.document
    folder = workspace.store.folder(stage.kind, row.key)
    problem, row.artifact = workspace.store.inspect(folder) if folder.is_dir() else (None, None)
    if row.artifact:
        row.status = "cached"
        return []
    if isinstance(stage, Training):
        row.checkpoint = newest(workspace.work(row.key), row.key)
        row.refused = row.checkpoint.refused(stage.resources) if row.checkpoint else None
    if problem:
        return [Reason("corrupt", f"its artifact is broken: {problem}")]
    if earlier and earlier.key == row.key:
        return [Reason("missing", "its artifact is no longer in the store")]
    return list(_compared(earlier, row.document, input_slots(stage), set())) if earlier else [NEVER]


def refusals(loaded: Loaded, pipeline_name: str, rows: Sequence[PlanRow]) -> Iterator[Problem]:
    """Yield a problem for each unfinished training that cannot resume with its current resources."""
    for row in rows:
        if row.refused:
            yield loaded.placed(Problem("resources", *row.refused), pipeline_name, row.stage)


def document_of(stage: ProgramStage, inputs: Mapping[str, Artifact], resolved: ResolvedInputs, pipeline: Pipeline) -> dict[str, Any]:
    """Return the key document of a stage."""
    outside = Outside(resolved.digests, resolved.commits, resolved.libraries)
    document = key_document(stage, program_version(stage.kind), inputs, outside, pipeline.salt)
    return document | ({"history": names_in_history(pipeline.stages, stage, inputs)} if stage.describes_history else {})


def unpinned(workspace: Workspace, pipeline: str, rows: Sequence[PlanRow]) -> Iterator[Problem]:
    """Yield a warning for each benchmark to run whose data may change without changing its key."""
    stages = workspace.loaded.pipeline(pipeline).stages
    for row in rows:
        for path, data in benchmark_data(workspace, stages[row.stage]) if row.artifact is None else ():
            if data.unknown and data != NOT_SET_UP:
                message = f"its data is not in the cache key and may change: {data.unknown}"
                yield workspace.loaded.placed(Problem(path, message, ""), pipeline, row.stage)


@lru_cache
def _program_versions() -> dict[str, dict[str, Any]]:
    return dict(json.loads((PACKAGES_ROOT / "tasks" / "versions.json").read_bytes()))


def program_version(kind: str) -> int:
    return int(_program_versions()[kind]["version"])


# --- reasons ----------------------------------------------------------------------------------------------------------

_SECTIONS: dict[str, ReasonCode] = {"libraries": "library", "files": "file", "commits": "input", "inputs": "input"}


def _compared(earlier: StageRecord, new: Mapping[str, Any], slots: Mapping[str, str], waiting: set[str]) -> Iterator[Reason]:
    """Yield why the key differs from the stage's last one."""
    old = earlier.document or {}
    for path, before, after in _differences(old.get("config", {}), new["config"]):
        yield Reason("config", f"{path} {_shown(before)} -> {_shown(after)}", path, before, after)
    if old.get("salt") != new["salt"]:
        yield Reason("config", "the pipeline's salt changed", "salt", old.get("salt"), new["salt"])
    if (old.get("program"), old.get("schema")) != (new["program"], new["schema"]):
        text = f"tuneline's {earlier.kind} program changed"
        yield Reason("code", text, "program", old.get("program"), new["program"])
    for section, code in _SECTIONS.items():
        before_all, after_all = old.get(section, {}), new[section]
        for name in sorted((before_all.keys() | after_all.keys()) - (waiting if section == "inputs" else set())):
            before, after = before_all.get(name), after_all.get(name)
            if before == after:
                continue
            if section == "inputs":
                text = f"{slots.get(name, name)} changed"
            elif section == "libraries":
                text = f"{name} {before or 'absent'} -> {after or 'absent'}"
            else:
                text = f"the {'file' if code == 'file' else 'hub repository'} of {name} changed"
            yield Reason(code, text, name, before, after)
    if old.get("history") != new.get("history") and old.get("inputs") == new["inputs"] and not waiting:
        yield Reason("input", "its inputs were made in another way, or their stages have other names", "history")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif (isinstance(old, dict) and new is None) or (isinstance(new, dict) and old is None):
        yield from _differences(old or {}, new or {}, path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}.{i}")
    elif old != new:
        yield path, old, new


def _shown(value: Any) -> str:
    return "(default)" if value is None else json.dumps(value) if not isinstance(value, str) else value


def _unanswered(workspace: Workspace, stage: Stage) -> Iterator[Problem]:
    """Yield a problem for each revision that the hub cannot resolve."""
    for path, *wanted in hub_inputs(workspace, stage):
        try:
            workspace.hub.commit(*wanted)
        except StageFailed as error:
            yield Problem(path, error.message, error.hint)
