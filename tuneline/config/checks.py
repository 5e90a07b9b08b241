"""Checks of pipelines.yaml that types cannot express: references name a stage with the right artifact, there are no cycles,
numbers divide, and paths stay inside the allowed folders.

They use the raw tree as well as the types, so that one wrong stage does not hide problems of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from tuneline.config.deadlocks import deadlocks
from tuneline.config.hints import in_place_of_stage
from tuneline.config.order import cycles, depends_on
from tuneline.config.spec import AnyStage, Runtime, Spec
from tuneline.config.yaml_source import Keys
from tuneline.kinds.engine import CPU_RUNTIME, GPU_RUNTIME
from tuneline.kinds.fields import OutsideFile, Reference, annotated_values
from tuneline.kinds.stage import ProgramStage, Stage
from tuneline.kinds.training import Training
from tuneline.paths import allowed_folders, folder_to_allow, outside, resolve_path
from tuneline.secrets import FROM_ENVIRONMENT, TOKEN
from tuneline.wording import listed, nearest, with_article

BUILT_IN_RUNTIMES = ("torch", "quantize", CPU_RUNTIME, GPU_RUNTIME)
_STAGE: TypeAdapter[Stage] = TypeAdapter(AnyStage)
Report = Callable[[Keys, str, str, bool], None]
"""Takes (path in the file, message, hint, whether the place is the key instead of the value)."""


def _tokens(node: Any, path: Keys) -> Iterator[Keys]:
    """Yield the paths of values that look like access tokens."""
    if isinstance(node, str) and TOKEN.search(node):
        yield path
    for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _tokens(item, (*path, key))


def keys_of(field: str) -> Keys:
    return tuple(int(part) if part.isdecimal() else part for part in field.split(".")) if field else ()


class Checks:
    def __init__(self, root: Path, tree: Mapping[str, Any], spec: Spec | None, report: Report):
        """`spec` is None if types are wrong. In `tree`, variables are substituted."""
        self.root, self.tree, self.spec, self._report = root, tree, spec, report
        self.roots = [named for named in _list(tree.get("roots")) if isinstance(named, str)]

    def problem(self, path: Keys, message: str, hint: str = "", at_key: bool = False) -> None:
        self._report(path, message, hint, at_key)

    def run(self) -> None:
        for path in _tokens(self.tree, ()):
            self.problem(
                path, "found a token, expected none: it would be visible in keys, manifests and Prefect's parameters", FROM_ENVIRONMENT
            )
        runtimes = _mapping(self.tree.get("runtimes"))
        for name, raw in runtimes.items():
            self._runtime(("runtimes", name), name, raw)
        if "://" in str(self.tree.get("store")):
            self.problem(("store",), f"found `{self.tree['store']}`, expected a folder", "mount the storage and name its folder")
        self._pools()
        self._trackers()
        for name, pipeline in _mapping(self.tree.get("pipelines")).items():
            raw_stages = _mapping(_mapping(pipeline).get("stages"))
            stages = self.spec.pipelines[name].stages if self.spec else dict(_valid(raw_stages))
            self._stages(("pipelines", name, "stages"), raw_stages, stages, {*BUILT_IN_RUNTIMES, *runtimes})

    def _pools(self) -> None:
        """Check names of pools and queues, and schedules. Requires that all types are valid."""
        if self.spec is None:
            return
        pools = self.spec.pools
        for name, pool in pools.items():
            priorities: dict[int, str] = {}
            for queue_name, each in pool.queues.items():
                if (other := priorities.setdefault(each.priority, queue_name)) != queue_name:
                    found = f"found {each.priority}, the priority of `{other}`, expected a different number"
                    self.problem(("pools", name, "queues", queue_name, "priority"), found, "give each queue of a pool its own priority")
        for name, found, hint in deadlocks(self.spec):
            self.problem(("pools", name, "concurrency"), found, hint)
        for name, pipeline in self.spec.pipelines.items():
            here: Keys = ("pipelines", name)
            self._pool_name((*here, "pool"), pipeline.pool)
            for stage_name, stage in pipeline.stages.items():
                if isinstance(stage, ProgramStage):
                    self._pool_name((*here, "stages", stage_name, "pool"), stage.pool)
            queues = ["default", *pools[pipeline.pool].queues] if pipeline.pool in pools else []
            schedules = [((*here, "schedules", key), schedule) for key, schedule in pipeline.schedules.items()]
            for path, queue in [(here, pipeline.queue), *((path, schedule.queue) for path, schedule in schedules)]:
                if queue is not None and pipeline.pool is None:
                    self.problem((*path, "queue"), "found a queue without `pool`", "name the pool that the pipeline runs in")
                elif queue is not None and pipeline.pool in pools and queue not in queues:
                    found = f"found the unknown queue `{queue}` of pool `{pipeline.pool}`, expected {listed(queues)}"
                    self.problem((*path, "queue"), found, nearest(queue, queues))
            if schedules and pipeline.pool is None:
                self.problem((*here, "schedules"), "found schedules without `pool`", "name the pool that the pipeline runs in", at_key=True)
            for path, schedule in schedules:
                for problem in schedule.problems():
                    self.problem((*path, *keys_of(problem.field)), problem.message, problem.hint, at_key=not problem.field)

    def _trackers(self) -> None:
        for name, pipeline in self.spec.pipelines.items() if self.spec else ():
            here: Keys = ("pipelines", name, "track")
            if pipeline.track and not any(isinstance(stage, Training) for stage in pipeline.stages.values()):
                self.problem(here, "found trackers in a pipeline without a training, which show nothing", "remove `track:`", at_key=True)
            for problem in pipeline.track.problems() if pipeline.track else ():
                self.problem((*here, *keys_of(problem.field)), problem.message, problem.hint, at_key=not problem.field)

    def _pool_name(self, path: Keys, name: str | None) -> None:
        assert self.spec is not None
        if name is not None and name not in self.spec.pools:
            found = f"found the unknown pool `{name}`, expected {listed(self.spec.pools)}"
            self.problem(path, found, nearest(name, self.spec.pools) or "declare it under `pools:`")

    def _runtime(self, here: Keys, name: str, raw: Any) -> None:
        if name in BUILT_IN_RUNTIMES:
            self.problem(here, f"found `{name}`, which is built in", "choose another name", at_key=True)
        given = [field for field in ("lock", "python") if _mapping(raw).get(field) is not None]
        if isinstance(raw, dict) and len(given) != 1:
            self.problem(here, f"found {' and '.join(given) or 'nothing'}, expected exactly one of lock, python", at_key=True)
        if isinstance(_mapping(raw).get("lock"), str):
            self._paths(here, Runtime(lock=raw["lock"]))

    def _paths(self, here: Keys, model: BaseModel) -> None:
        for field, _, named in annotated_values(model, OutsideFile):
            path = (*here, *keys_of(field))
            if not named:
                self.problem(path, "found an empty path, expected a path", "write `.` for the folder of the file itself")
            elif outside(resolve_path(self.root, named), allowed_folders(self.root, self.roots)):
                places = ", ".join(["the folder of the file", *self.roots])
                folder = folder_to_allow(named)
                folder = "'~'" if folder == "~" else folder  # unquoted, ~ is null in YAML
                hint = f"add `{folder}` to `roots:`" if self.roots else f"add `roots: [{folder}]` at the top of the file"
                self.problem(path, f"found '{named}', expected a path inside {places}", hint)

    def _stages(self, at: Keys, raw: Mapping[str, Any], stages: Mapping[str, Stage], runtimes: set[str]) -> None:
        for name, stage in stages.items():
            here = (*at, name)
            common = stage.common_problems() if isinstance(stage, ProgramStage) else ()
            for problem in (*stage.problems(), *common):
                self.problem((*here, *keys_of(problem.field)), problem.message, problem.hint, at_key=not problem.field)
            if isinstance(stage, ProgramStage):
                engine = stage.resources.engine.runtime if stage.resources.engine else None
                for field, runtime in (("runtime", stage.runtime), ("resources.engine.runtime", engine)):
                    if runtime is not None and runtime not in runtimes:
                        found = f"found `{runtime}`, expected {listed(sorted(runtimes))}"
                        self.problem((*here, *keys_of(field)), found, nearest(runtime, runtimes) or "declare it under `runtimes:`")
            for field, reference, target in annotated_values(stage, Reference):
                self._reference((*here, *keys_of(field)), name, reference, target, raw, stages)
            self._paths(here, stage)
            for field, dataset, split in stage.held_out():
                if dataset in stages and not stages[dataset].holds_out(split):
                    found = f"found `{dataset}`, which has no {split} split"
                    self.problem((*here, *keys_of(field)), found, f"add `split: {{{split}: 0.05}}` to `{dataset}`")
            for problem in stage.upstream_problems(stages):
                self.problem((*here, *keys_of(problem.field)), problem.message, problem.hint)
        needs = {name: [need for need in depends_on(stage) if need in stages and need != name] for name, stage in stages.items()}
        for ring in cycles(needs):
            self.problem((*at, ring[0]), f"found a cycle: {' -> '.join(ring)}", _way_out(ring, stages), at_key=True)

    def _reference(
        self, path: Keys, name: str, reference: Reference, target: str, raw: Mapping[str, Any], stages: Mapping[str, Stage]
    ) -> None:
        given = stages[target].output_type() if target in stages else None
        if target != name and target in raw and (given is None or not reference.types or given in reference.types):
            if given and reference.full_precision and stages[target].quantized:
                found = f"found `{target}`, which is quantized, expected a model in full precision"
                self.problem(path, found, "name the model that it was quantized from")
            return
        fitting = [
            other for other, stage in stages.items() if other != name and (not reference.types or stage.output_type() in reference.types)
        ]
        wanted = f"a stage that gives {' or '.join(with_article(kind) for kind in reference.types)}" if reference.types else "another stage"
        allowed = f"{wanted}: {listed(fitting)}"
        if target == name:
            self.problem(path, f"found the stage itself, expected {allowed}")
        elif given is None:
            only = f"write `{fitting[0]}`, the only such stage" if len(fitting) == 1 else ""
            hint = (
                in_place_of_stage(str(path[4]), reference.types, target) or nearest(target, fitting) or _same_words(target, fitting) or only
            )
            self.problem(path, f"found the unknown stage `{target}`, expected {allowed}", hint)
        else:
            self.problem(path, f"found `{target}`, which gives {with_article(given)}, expected {allowed}")


def _way_out(ring: list[str], stages: Mapping[str, Stage]) -> str:
    """Return a hint to break a cycle: preferably at a `needs`, which passes no artifact; else at one of the fields."""
    fields = []
    for name, other in pairwise(ring):
        naming = [field for field, _, target in annotated_values(stages[name], Reference) if target == other]
        fields.append((name, other, min(naming, key=lambda field: field.startswith("needs."))))
    for name, other, field in fields:
        if field.startswith("needs."):
            return f"remove `{other}` from `needs` of `{name}`"
    return f"name another stage in one of {listed(f'{name}.{field}' for name, _, field in fields)}"


def _same_words(name: str, known: Iterable[str]) -> str:
    """Suggest a known name that shares a word: `base` and `base-model`."""
    words = set(name.split("-"))
    return next((f"did you mean `{other}`?" for other in known if words & set(other.split("-"))), "")


def _valid(raw: Mapping[str, Any]) -> Iterable[tuple[str, Stage]]:
    for name, fields in raw.items():
        try:
            yield name, _STAGE.validate_json(json.dumps(fields), strict=True)
        except ValidationError:
            continue  # reported by the type check


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
