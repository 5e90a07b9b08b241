"""What the types of pipelines.yaml cannot say: references name a stage that gives the right artifact, nothing waits for itself,
numbers divide, paths stay inside the folders that the file may name.

Works on the raw tree beside the types, so that one wrong stage does not hide what is wrong with the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from tuneline.config.deadlocks import deadlocks
from tuneline.config.messages import listed, nearest, shown
from tuneline.config.order import cycles, depends_on
from tuneline.config.spec import AnyStage, Runtime, Spec
from tuneline.config.yaml_source import Keys
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.engine import CPU_RUNTIME, GPU_RUNTIME
from tuneline.kinds.evaluate import SCORES, EvaluateStage, incomparable_fields
from tuneline.kinds.fields import OutsideFile, Reference, annotated_values
from tuneline.kinds.gate import GateStage
from tuneline.kinds.quantize import QuantizeStage
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import ProgramStage, Resources, Stage
from tuneline.kinds.training import Training
from tuneline.paths import allowed_folders, folder_to_allow, outside, resolve_path
from tuneline.secrets import FROM_ENVIRONMENT, TOKEN

BUILT_IN_RUNTIMES = ("torch", "quantize", CPU_RUNTIME, GPU_RUNTIME)
# Of `resources`: without effect elsewhere.
TRAINING_ONLY = (
    "strategy", "offload", "sequence_parallel_size", "gradient_checkpointing",
    "checkpoint_steps", "checkpoint_minutes", "checkpoints_kept", "collective_timeout",
)  # fmt: skip
_STAGE: TypeAdapter[Stage] = TypeAdapter(AnyStage)
Report = Callable[[Keys, str, str, bool], None]
"""(path in the file, message, hint, whether its key is at fault)."""


def _tokens(node: Any, path: Keys) -> Iterator[Keys]:
    """Where something stands that looks like an access token."""
    if isinstance(node, str) and TOKEN.search(node):
        yield path
    for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _tokens(item, (*path, key))


def keys_of(field: str) -> Keys:
    return tuple(int(part) if part.isdecimal() else part for part in field.split(".")) if field else ()


class Checks:
    def __init__(self, root: Path, tree: Mapping[str, Any], spec: Spec | None, report: Report):
        """`spec` is None where types are wrong; `tree` has its variables put in."""
        self.root, self.tree, self.spec, self._report = root, tree, spec, report
        self.roots = [named for named in _list(tree.get("roots")) if isinstance(named, str)]

    def problem(self, path: Keys, message: str, hint: str = "", at_key: bool = False) -> None:
        self._report(path, message, hint, at_key)

    def run(self) -> None:
        for path in _tokens(self.tree, ()):
            self.problem(path, "found a token, expected none: it would be in keys, manifests and Prefect's parameters", FROM_ENVIRONMENT)
        runtimes = _mapping(self.tree.get("runtimes"))
        for name, raw in runtimes.items():
            self._runtime(("runtimes", name), name, raw)
        if "://" in str(self.tree.get("store")):
            self.problem(("store",), f"found `{self.tree['store']}`, expected a folder", "mount shared storage and name its folder")
        self._pools()
        for name, pipeline in _mapping(self.tree.get("pipelines")).items():
            raw_stages = _mapping(_mapping(pipeline).get("stages"))
            stages = self.spec.pipelines[name].stages if self.spec else dict(_valid(raw_stages))
            self._stages(("pipelines", name, "stages"), raw_stages, stages, {*BUILT_IN_RUNTIMES, *runtimes})

    def _pools(self) -> None:
        """Pools and queues that are named are there; schedules can be. Only once all types are right: the names hang together."""
        if self.spec is None:
            return
        pools = self.spec.pools
        for name, pool in pools.items():
            priorities: dict[int, str] = {}
            for queue_name, each in pool.queues.items():
                if (other := priorities.setdefault(each.priority, queue_name)) != queue_name:
                    found = f"found {each.priority}, which is that of `{other}`, expected a number of its own"
                    self.problem(("pools", name, "queues", queue_name, "priority"), found, "Prefect keeps queues of a pool in one order")
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
                self.problem(path, "found an empty path, expected a path", "the folder of the file itself is `.`")
            elif outside(resolve_path(self.root, named), allowed_folders(self.root, self.roots)):
                places = ", ".join(["the folder of the file", *self.roots])
                folder = folder_to_allow(named)
                folder = "'~'" if folder == "~" else folder  # which is nothing in YAML
                hint = f"add `{folder}` to `roots:`" if self.roots else f"add `roots: [{folder}]` at the top of the file"
                self.problem(path, f"found '{named}', expected paths inside {places}", hint)

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
            self._held_out(here, stage, stages)
            if isinstance(stage, EvaluateStage) and stage.uses_engine():
                self._served(here, stage, stages)
            if isinstance(stage, Training):
                self._same_base(here, stage, stages)
            elif isinstance(stage, ProgramStage) and stage.world_size() > 1:
                field = next(name for name in ("nodes", "processes", "gpus") if (getattr(stage.resources, name) or 1) > 1)
                found = f"found {getattr(stage.resources, field)} for {stage.kind}, expected 1"
                hint = "write `gpus: 1`" if field == "gpus" else "remove it"
                self.problem((*here, "resources", field), found, f"only trainings run in several processes: {hint}")
            elif isinstance(stage, ProgramStage):
                self._unused(here, stage, TRAINING_ONLY, "is no training")
                if not isinstance(stage, EvaluateStage):
                    self._unused(here, stage, ("micro_batch_size",), "does not work in batches")
            if isinstance(stage, GateStage):
                self._metrics(here, stage, stages)
        needs = {name: [need for need in depends_on(stage) if need in stages and need != name] for name, stage in stages.items()}
        for ring in cycles(needs):
            self.problem((*at, ring[0]), f"found a cycle: {' -> '.join(ring)}", _way_out(ring, stages), at_key=True)

    def _unused(self, here: Keys, stage: ProgramStage, fields: Iterable[str], why: str) -> None:
        """Fields of resources without effect, said once for all of one reason."""
        given = [field for field in fields if getattr(stage.resources, field) != Resources.model_fields[field].default]
        if given:
            found = f"found {listed(given)} for {stage.kind}, which {why}"
            self.problem((*here, "resources", given[0]), found, "remove it" if len(given) == 1 else "remove them")

    def _reference(
        self, path: Keys, name: str, reference: Reference, target: str, raw: Mapping[str, Any], stages: Mapping[str, Stage]
    ) -> None:
        given = stages[target].output_type() if target in stages else None
        if target != name and target in raw and (given is None or not reference.types or given in reference.types):
            if given and stages[name].kind in ("quantize", "sft", "grpo") and stages[target].kind == "quantize":
                found = f"found `{target}`, which is quantized, expected a model in full precision"
                self.problem(path, found, "name the model it was made from")
            return
        fitting = [
            other for other, stage in stages.items() if other != name and (not reference.types or stage.output_type() in reference.types)
        ]
        wanted = f"a stage that gives {' or '.join(with_article(kind) for kind in reference.types)}" if reference.types else "another stage"
        allowed = f"{wanted}: {listed(fitting)}"
        if target == name:
            self.problem(path, f"found the stage itself, expected {allowed}")
        elif given is None:
            only = f"write `{fitting[0]}`, the only one there is" if len(fitting) == 1 else ""
            hint = nearest(target, fitting) or _same_words(target, fitting) or only
            self.problem(path, f"found the unknown stage `{target}`, expected {allowed}", hint)
        else:
            self.problem(path, f"found `{target}`, which gives {with_article(given)}, expected {allowed}")

    def _held_out(self, here: Keys, stage: Stage, stages: Mapping[str, Stage]) -> None:
        """A dataset holds rows out where they are asked for."""
        wanted: list[tuple[str, str, str]] = []  # field, dataset, split
        if isinstance(stage, SftStage) and stage.eval_steps is not None:
            wanted.append(("eval_steps", stage.dataset, "validation"))
        if isinstance(stage, EvaluateStage):
            wanted += [(f"datasets.{i}", name, "test") for i, name in enumerate(stage.datasets)]
        if isinstance(stage, QuantizeStage):
            wanted.append(("calibration", stage.calibration, "test"))
        for field, name, split in wanted:
            dataset = stages.get(name)
            if isinstance(dataset, DatasetStage) and getattr(dataset.split, split) == 0:
                found = f"found `{name}`, which holds no rows out for {split}"
                self.problem((*here, *keys_of(field)), found, f"`split: {{{split}: 0.05}}` in `{name}`")

    def _served(self, here: Keys, stage: EvaluateStage, stages: Mapping[str, Stage]) -> None:
        """vLLM takes what is evaluated (vllm/model_executor/layers/quantization/auto_gptq.py)."""
        scored, problem = stages.get(stage.model), None
        if isinstance(scored, QuantizeStage) and not stage.resources.gpus:
            problem = "GPTQ and no GPU: vLLM computes it in half precision only, an evaluation on a CPU is in float32"
        elif isinstance(scored, QuantizeStage) and stage.compute_type() == "float32":
            problem = "GPTQ in float32: vLLM computes it in half precision only"
        elif isinstance(scored, QuantizeStage) and (scored.bits not in (4, 8) or not scored.sym):
            problem = f"bits {scored.bits} and sym {str(scored.sym).lower()}, where vLLM reads 4 or 8 bits, symmetric"
        elif isinstance(scored, Training) and scored.output_type() == "Adapter":
            problem = scored.lora.unserved()
        if problem:
            self.problem((*here, "model"), f"found `{stage.model}` with {problem}", "set `backend: transformers`")

    def _same_base(self, here: Keys, stage: Training, stages: Mapping[str, Stage]) -> None:
        other = stages.get(stage.adapter or "")
        if isinstance(other, Training) and other.model != stage.model:
            self.problem((*here, "adapter"), f"found `{stage.adapter}`, trained on `{other.model}`, expected adapters of `{stage.model}`")

    def _metrics(self, here: Keys, gate: GateStage, stages: Mapping[str, Stage]) -> None:
        """A metric of a Report must be of something that the evaluation scores; what a benchmark measures only lm-eval knows."""
        for i, requirement in enumerate(gate.require):
            for other in filter(None, (requirement.of, requirement.compared_with)):
                stage = stages.get(other)
                subject = requirement.metric.partition("/")[0]
                if isinstance(stage, EvaluateStage) and stage.datasets and not stage.benchmarks and subject not in stage.datasets:
                    found = f"found `{requirement.metric}`, but `{other}` scores only {listed(stage.datasets)}"
                    self.problem((*here, "require", i, "metric"), found, f"write `{stage.datasets[0]}/exact_match`, say")
                elif isinstance(stage, EvaluateStage) and subject in stage.datasets and other == requirement.of:
                    figure = requirement.metric.partition("/")[2].removesuffix("_stderr")
                    if figure not in SCORES:
                        found = f"found `{requirement.metric}`, expected of rows {listed(SCORES)}"
                        self.problem(
                            (*here, "require", i, "metric"), found, nearest(figure, SCORES) or f"write `{subject}/exact_match`, say"
                        )
                elif (
                    isinstance(stage, ProgramStage)
                    and not isinstance(stage, EvaluateStage)
                    and isinstance(stages.get(subject), DatasetStage)
                ):
                    found = f"found `{requirement.metric}` of `{other}`, which is no evaluation"
                    self.problem((*here, "require", i, "metric"), found, "compare the figures of two stages of kind evaluate")
            one, two = stages.get(requirement.of), stages.get(requirement.compared_with or "")
            for field in incomparable_fields(requirement.metric, one, two) if one and two else ():
                values = [shown(getattr(each, field)) for each in (two, one)]
                names = (requirement.compared_with, requirement.of)
                found = f"found `{names[0]}` with {field} {values[0]}, `{names[1]}` with {values[1]}, expected the same"
                path = (*here, "require", i, "improves_on" if requirement.improves_on else "not_below")
                self.problem(path, f"{found}: else they are asked other things", f"set the same {field} in both")


def _way_out(ring: list[str], stages: Mapping[str, Stage]) -> str:
    """What to cut a ring of stages at: a `needs`, which hands nothing on; else one of the fields."""
    fields = []
    for name, other in pairwise(ring):
        naming = [field for field, _, target in annotated_values(stages[name], Reference) if target == other]
        fields.append((name, other, min(naming, key=lambda field: field.startswith("needs."))))
    for name, other, field in fields:
        if field.startswith("needs."):
            return f"take `{other}` out of `needs` of `{name}`"
    return f"name another stage in one of {listed(f'{name}.{field}' for name, _, field in fields)}"


def _same_words(name: str, known: Iterable[str]) -> str:
    """For a stage that got a longer or a shorter name: `base` and `base-model`."""
    words = set(name.split("-"))
    return next((f"did you mean `{other}`?" for other in known if words & set(other.split("-"))), "")


def with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}"


def _valid(raw: Mapping[str, Any]) -> Iterable[tuple[str, Stage]]:
    for name, fields in raw.items():
        try:
            yield name, _STAGE.validate_json(json.dumps(fields), strict=True)
        except ValidationError:
            continue  # reported with the types


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
