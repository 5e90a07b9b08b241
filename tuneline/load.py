"""pipelines.yaml -> Spec, or every problem of it at once.

    read the file -> apply --set and --var -> put ${variables} in -> check types (pydantic) -> check what types cannot say

What types cannot say: references name a stage that gives the right artifact, nothing depends on itself, numbers divide.
Nothing here looks at the machine: the same file is valid everywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tuneline.errors import ConfigError, Problem
from tuneline.fields import Reference, annotated_values
from tuneline.messages import nearest, translate
from tuneline.source import Keys, Source, dotted, parse, read
from tuneline.spec import AnyStage, EvaluateStage, GateStage, Pipeline, ProgramStage, SftStage, Spec, Stage

BUILT_IN_RUNTIMES = ("torch",)
VARIABLE = re.compile(r"\$(\$?)\{([^{}]*)\}")
FROM_ENVIRONMENT = ("store", "runtimes")
_STAGE: TypeAdapter[Stage] = TypeAdapter(AnyStage)


@dataclass(frozen=True)
class Loaded:
    """A valid file: its spec, and the folder that its relative paths start from."""

    spec: Spec
    file: Path
    source: Source
    overrides: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.file.parent

    def pipeline(self, name: str) -> Pipeline:
        """Raises ConfigError for a name that is not in the file."""
        if name not in self.spec.pipelines:
            raise ConfigError([_unknown_pipeline(name, list(self.spec.pipelines), self.source.name)])
        return self.spec.pipelines[name]


def load(
    file: Path,
    pipeline: str | None = None,
    sets: Sequence[str] = (),
    variables: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Loaded:
    """Reads and checks `file`. `sets` (`stage.field=value`) apply to `pipeline`, `variables` are `name=value`.

    Raises ConfigError with every problem found.
    """
    source = read(file, _shown(file))
    return check(source, file.absolute(), pipeline, sets, variables, environment)


def check(
    source: Source,
    file: Path,
    pipeline: str | None = None,
    sets: Sequence[str] = (),
    variables: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Loaded:
    checker = _Checker(source, environment)
    if not isinstance(source.tree, dict):
        checker.problem((), f"found {type(source.tree).__name__}, allowed a mapping with version, pipelines, ...")
        raise ConfigError(checker.problems)
    used = checker.variables_named(source.tree)
    checker.set_variables(variables)
    checker.set_fields(pipeline, sets)
    tree = checker.substitute(source.tree, ())
    checker.unused_variables(used)
    spec: Spec | None = None
    try:
        spec = Spec.model_validate_json(json.dumps(tree, allow_nan=True), strict=True)
    except ValidationError as error:
        for path, at_key, message, hint in translate(error, tree):
            if path not in checker.unresolved:
                checker.problem(path, message, hint, at_key)
    checker.across_fields(tree)
    if checker.problems or spec is None:
        raise ConfigError(sorted(set(checker.problems), key=checker.order))
    return Loaded(spec, file, source, (*sets, *(f"--var {v}" for v in variables)))


class _Checker:
    def __init__(self, source: Source, environment: Mapping[str, str]):
        self.source, self.environment = source, environment
        self.problems: list[Problem] = []
        self.unresolved: set[Keys] = set()  # values that name an unknown variable
        self.flags: dict[Keys, str] = {}  # what came from the command line stands there, not in the file

    def problem(self, path: Keys, message: str, hint: str = "", at_key: bool = False) -> None:
        place = next((self.flags[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.flags), None)
        self.problems.append(Problem(place or self.source.place(path, at_key), dotted(path), message, hint))

    @staticmethod
    def order(problem: Problem) -> tuple[Any, ...]:
        return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", problem.place)), problem.path

    # --- the command line -------------------------------------------------------------------------------------------

    def set_variables(self, variables: Sequence[str]) -> None:
        declared = self.source.tree.get("vars")
        declared = declared if isinstance(declared, dict) else {}
        for text in variables:
            name, equals, value = text.partition("=")
            flag = f"--var {name}"
            if not equals:
                self.problems.append(Problem(flag, "", "found no `=`, allowed name=value"))
            elif name not in declared:
                hint = nearest(name, declared)
                self.problems.append(Problem(flag, "", f"found an unknown variable, allowed {_listed(declared)}", hint))
            else:
                declared[name] = self._value(flag, value)
                self.flags["vars", name] = flag

    def set_fields(self, pipeline: str | None, sets: Sequence[str]) -> None:
        if not sets:
            return
        pipelines = self.source.tree.get("pipelines")
        stages = pipelines.get(pipeline, {}).get("stages") if isinstance(pipelines, dict) else None
        if not isinstance(stages, dict):
            return  # the pipeline itself is wrong, and is reported as that
        assert pipeline is not None
        for text in sets:
            name, equals, value = text.partition("=")
            flag = f"--set {name}"
            parts = name.split(".")
            if not equals or len(parts) < 2:
                self.problems.append(Problem(f"--set {text}", "", "found no value to set, allowed stage.field=value"))
                continue
            if parts[0] not in stages:
                found = f"found an unknown stage `{parts[0]}`, allowed {_listed(stages)}"
                self.problems.append(Problem(flag, "", found, nearest(parts[0], stages)))
                continue
            keys, node = self._descend(stages, parts, flag)
            if node is not None:
                node[keys[-1]] = self._value(flag, value)
                self.flags["pipelines", pipeline, "stages", *keys] = flag

    def _descend(self, node: Any, parts: list[str], flag: str) -> tuple[list[str | int], Any]:
        """The container of the last part, mappings on the way made where they are missing."""
        keys: list[str | int] = []
        for i, part in enumerate(parts):
            key: str | int = part
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    self.problems.append(Problem(flag, "", f"found `{part}` for a place in a list of {len(node)}", "places count from 0"))
                    return keys, None
                key = int(part)
            elif not isinstance(node, dict):
                self.problems.append(Problem(flag, "", f"found no fields under `{'.'.join(parts[:i])}`, it is a plain value"))
                return keys, None
            keys.append(key)
            if i < len(parts) - 1:
                if isinstance(node, dict) and node.get(part) is None:
                    node[part] = {}
                node = node[key]
        return keys, node

    def _value(self, flag: str, text: str) -> Any:
        try:
            return parse(text, flag).tree if text.strip() else ""
        except ConfigError as error:
            self.problems += [Problem(flag, "", problem.message, problem.hint) for problem in error.problems]
            return None

    # --- variables --------------------------------------------------------------------------------------------------

    def variables_named(self, tree: Any) -> set[str]:
        texts = list(_texts({key: value for key, value in tree.items() if key != "vars"}))
        return {match[2] for text in texts for match in VARIABLE.finditer(text) if not match[1]}

    def unused_variables(self, used: set[str]) -> None:
        declared = self.source.tree.get("vars")
        for name in declared if isinstance(declared, dict) else ():
            if name not in used and not self.unresolved:
                self.problem(
                    ("vars", name), f"found the variable `{name}`, used nowhere", "remove it, or write ${" + name + "}", at_key=True
                )

    def substitute(self, node: Any, path: Keys) -> Any:
        if isinstance(node, dict):
            return {key: value if (path, key) == ((), "vars") else self.substitute(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.substitute(item, (*path, i)) for i, item in enumerate(node)]
        if not isinstance(node, str) or "${" not in node:
            return node
        whole = VARIABLE.fullmatch(node)
        if whole and not whole[1]:
            return self._variable(whole[2], path)
        return VARIABLE.sub(lambda match: match[0][1:] if match[1] else str(self._variable(match[2], path)), node)

    def _variable(self, name: str, path: Keys) -> Any:
        declared = self.source.tree.get("vars")
        declared = declared if isinstance(declared, dict) else {}
        if name.startswith("env:"):
            name = name.removeprefix("env:")
            if path[0] not in FROM_ENVIRONMENT:
                self.unresolved.add(path)
                hint = "a pipeline must not depend on the shell it is started from; use vars and --var"
                self.problem(path, f"found ${{env:{name}}}, allowed only in {' and '.join(FROM_ENVIRONMENT)}", hint)
            elif name not in self.environment:
                self.unresolved.add(path)
                self.problem(path, f"found ${{env:{name}}}, but {name} is not set", f"export {name}=...")
            return self.environment.get(name, "")
        if name not in declared:
            hint = nearest(name, declared) or "declare it under `vars:`"
            self.unresolved.add(path)
            self.problem(path, f"found the unknown variable ${{{name}}}, allowed {_listed(declared)}", hint)
            return None
        return declared[name]

    # --- what types cannot say --------------------------------------------------------------------------------------

    def across_fields(self, tree: Any) -> None:
        runtimes = tree.get("runtimes") if isinstance(tree.get("runtimes"), dict) else {}
        for name, runtime in runtimes.items():
            if name in BUILT_IN_RUNTIMES:
                self.problem(("runtimes", name), f"found `{name}`, which is built in", "choose another name", at_key=True)
            if isinstance(runtime, dict) and len(runtime) != 1:
                self.problem(("runtimes", name), "found neither or both of lock and python, allowed exactly one", at_key=True)
        if "://" in str(tree.get("store")):
            self.problem(("store",), f"found `{tree['store']}`, allowed a folder", "mount shared storage and name its folder")
        pipelines = tree.get("pipelines")
        for name, pipeline in pipelines.items() if isinstance(pipelines, dict) else ():
            raw = pipeline.get("stages") if isinstance(pipeline, dict) else None
            if isinstance(raw, dict):
                self._across_stages(("pipelines", name, "stages"), raw, {*BUILT_IN_RUNTIMES, *runtimes})

    def _across_stages(self, at: Keys, raw: dict[str, Any], runtimes: set[str]) -> None:
        stages: dict[str, Stage] = {}
        for name, fields in raw.items():
            try:
                stages[name] = _STAGE.validate_json(json.dumps(fields), strict=True)
            except ValidationError:
                continue  # reported with the types
        for name, stage in stages.items():
            here = (*at, name)
            for finding in stage.findings():
                self.problem((*here, *_keys(finding.field)), finding.message, finding.hint, at_key=not finding.field)
            if isinstance(stage, ProgramStage) and stage.runtime not in runtimes:
                found = f"found `{stage.runtime}`, allowed {_listed(sorted(runtimes))}"
                self.problem((*here, "runtime"), found, nearest(stage.runtime, runtimes) or "declare it under `runtimes:`")
            for field, reference, target in annotated_values(stage, Reference):
                self._reference((*here, *_keys(field)), name, reference, target, raw, stages)
            if isinstance(stage, SftStage):
                self._same_base(here, stage, stages)
            elif isinstance(stage, ProgramStage) and stage.resources.world_size > 1:
                found = f"found {stage.resources.world_size} processes for {stage.kind}, allowed one"
                self.problem((*here, "resources"), found, "only trainings run in several processes: write `gpus: 1`")
            if isinstance(stage, GateStage):
                self._metrics(here, stage, stages)
        self._cycles(at, stages)

    def _reference(self, path: Keys, name: str, reference: Reference, target: str, raw: dict[str, Any], stages: dict[str, Stage]) -> None:
        fitting = [other for other, stage in stages.items() if other != name and (not reference.types or stage.gives in reference.types)]
        wanted = f"a stage that gives a {' or '.join(reference.types)}" if reference.types else "another stage"
        allowed = f"{wanted}: {_listed(fitting)}"
        if target not in raw:
            self.problem(path, f"found the unknown stage `{target}`, allowed {allowed}", nearest(target, fitting))
        elif target == name:
            self.problem(path, f"found the stage itself, allowed {allowed}")
        elif target in stages and target not in fitting:
            self.problem(path, f"found `{target}`, which gives a {stages[target].gives}, allowed {allowed}")
        elif stages[name].kind in ("quantize", "sft") and target in stages and stages[target].kind == "quantize":
            self.problem(
                path, f"found `{target}`, which is quantized, allowed a model in full precision", "name the model it was made from"
            )

    def _same_base(self, here: Keys, stage: SftStage, stages: dict[str, Stage]) -> None:
        other = stages.get(stage.adapter or "")
        if isinstance(other, SftStage) and other.model != stage.model:
            self.problem((*here, "adapter"), f"found `{stage.adapter}`, trained on `{other.model}`, allowed adapters of `{stage.model}`")

    def _metrics(self, here: Keys, gate: GateStage, stages: dict[str, Stage]) -> None:
        """A metric of a Report must be of something that the evaluation scores; what a benchmark measures only lm-eval knows."""
        for i, requirement in enumerate(gate.require):
            for other in (requirement.of, requirement.improves_on, requirement.not_below):
                stage = stages.get(other or "")
                subject = requirement.metric.partition("/")[0]
                if isinstance(stage, EvaluateStage) and not stage.benchmarks and subject not in stage.datasets:
                    found = f"found `{requirement.metric}`, but `{other}` scores only {_listed(stage.datasets)}"
                    self.problem((*here, "require", i, "metric"), found, f"write `{stage.datasets[0]}/exact_match`, say")

    def _cycles(self, at: Keys, stages: dict[str, Stage]) -> None:
        try:
            TopologicalSorter({name: set(depends_on(stage)) & set(stages) - {name} for name, stage in stages.items()}).prepare()
        except CycleError as error:
            ring = error.args[1]
            self.problem((*at, ring[0]), f"found a cycle: {' -> '.join(reversed(ring))}", "a stage cannot wait for itself", at_key=True)


def depends_on(stage: Stage) -> list[str]:
    """Names of the stages that must be there first, each once, in the order of the fields."""
    return list(dict.fromkeys(target for _, _, target in annotated_values(stage, Reference)))


def in_order(pipeline: Pipeline) -> list[str]:
    """Stage names so that each comes after what it depends on, otherwise as written."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for other in depends_on(pipeline.stages[name]):
                visit(other)
            done[name] = None

    for name in pipeline.stages:
        visit(name)
    return list(done)


def with_ancestors(pipeline: Pipeline, name: str) -> set[str]:
    """The stage and everything it depends on, near and far."""
    found = {name}
    waiting = [name]
    while waiting:
        for other in depends_on(pipeline.stages[waiting.pop()]):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _unknown_pipeline(name: str, known: list[str], file: str) -> Problem:
    return Problem(file, "", f"found no pipeline `{name}`, allowed {_listed(known)}", nearest(name, known))


def _keys(field: str) -> Keys:
    return tuple(int(part) if part.isdigit() else part for part in field.split(".")) if field else ()


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _texts(item)


def _listed(names: Any) -> str:
    return ", ".join(names) or "none (there is none)"


def _shown(file: Path) -> str:
    try:
        return str(file.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
