"""Check whether a training fits: its rows the model's positions, its memory the GPUs of its pool. If not, find the cheapest change
that makes it fit.

Changes are tried in the order of their cost: none but another batch shape (micro-batch), a third more time (gradient
checkpointing), more communication or more GPUs (sharding, then sequence parallelism), transfers to CPU memory (offload), and
last a change of the result (fewer adapted layers, QLoRA).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from tuneline.config.pools import DockerPool, KubernetesPool, Pool
from tuneline.errors import Problem
from tuneline.estimates.architectures import Architecture, architecture_of
from tuneline.estimates.estimate import job_of, row_length
from tuneline.estimates.memory import Job
from tuneline.kinds.engine import EngineSettings
from tuneline.kinds.training import Training
from tuneline.planning.plan import PlanRow
from tuneline.workspace.workspace import Workspace

Change = dict[str, Any]  # dotted field of a stage to value
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
MOST_GPUS = 8  # per machine, if the pool does not say
FEWER = ("q_proj", "v_proj")  # what guides adapt when memory is short
SAFE = 0.9  # share of a GPU's memory: estimates of LoRA are off by up to 10%, others by more (docs/estimates.md)


def gib(size: int, digits: int = 1) -> str:
    return f"{size / (1 << 30):.{digits}f} GiB"


def warnings(workspace: Workspace, pipeline: str, rows: Sequence[PlanRow]) -> Iterator[Problem]:
    """Yield warnings about trainings: rows beyond the model's positions, heads that the processes cannot share, and memory that exceeds,
    or nearly exceeds, the pool's GPUs."""
    loaded, planned = workspace.loaded, {row.stage: row for row in rows}
    stages = loaded.pipeline(pipeline).stages
    for name, row in planned.items():
        stage = stages[name]
        if not isinstance(stage, Training) or row.artifact is not None:
            continue
        pool_name = stage.pool or loaded.pipeline(pipeline).pool
        pool = loaded.spec.pools[pool_name] if pool_name else None
        architecture = architecture_of(workspace, stages, planned, name)
        if isinstance(architecture, str):
            continue
        if problem := beyond_positions(stage, row_length(stages[stage.dataset]), architecture):
            yield loaded.placed(problem, pipeline, name)
        if (size := stage.resources.sequence_parallel_size) not in architecture.sharing:
            heads = f"model's {architecture.num_attention_heads} attention heads and {architecture.num_key_value_heads} key-value heads"
            allowed = ", ".join(map(str, architecture.sharing))
            found = f"found {size}, expected {allowed} for the {heads}"
            yield loaded.placed(Problem("resources.sequence_parallel_size", found, "change it: the run would fail"), pipeline, name)
            continue
        if pool is None or pool.gpu_memory is None or not stage.resources.gpus:
            continue
        job, room = job_of(architecture, stage, stages), room_for(stage, pool.gpu_memory)
        if (needed := job.memory().total) > SAFE * room:
            digits = next((digits for digits in range(1, 11) if gib(needed, digits) != gib(room, digits)), 1)
            found = f"about {gib(needed, digits)} of GPU memory are needed, the pool `{pool_name}` has {gib(room, digits)} for it"
            found += ", which is tight: estimates are off by 10% or more" if needed <= room else ""
            yield loaded.placed(Problem("", found, remedy(job, round(SAFE * room), gpus_of(pool), name)), pipeline, name)


def beyond_positions(stage: Training, row: int | None, architecture: Architecture) -> Problem | None:
    """Return a problem if sequences may exceed the model's positions, which programs reject (see tasks/training/sft.py)."""
    field, tokens = stage.positions(row)
    message = f"sequences may have {tokens} tokens, more than the model's positions, {architecture.positions:.0f}"
    hint = f"lower it, set `max_length` in `{stage.dataset}` to drop or truncate longer rows, or extend the model's RoPE in its config.json"
    return Problem(field, message, hint) if tokens > architecture.positions else None


def room_for(stage: Training, gpu_memory: str) -> int:
    """Return the GPU memory for the training in bytes, without vLLM's part if both share a GPU."""
    size = int(gpu_memory[:-2]) * UNITS[gpu_memory[-2:]]
    engine = stage.resources.engine or EngineSettings()
    shared = stage.uses_engine() and engine.gpus == 0
    return round(size * (1 - engine.gpu_memory_utilization)) if shared else size


def gpus_of(pool: Pool) -> int:
    return pool.gpus if isinstance(pool, DockerPool | KubernetesPool) and isinstance(pool.gpus, int) else MOST_GPUS


def remedy(job: Job, room: int, gpus: int, name: str) -> str:
    for change in changes(job, gpus):
        if found := suggestion(job, change, room, name):
            slow = "resources.offload" in change or "method" in change
            fewer = suggestion(job, fewer_layers(job), room, name) if slow and "lora.target_modules" not in change else ""
            return f"the cheapest change that fits: {found}{f'; or, with adapters on fewer layers: {fewer}' if fewer else ''}"
    return "no change of resources fits with 10% to spare: use larger GPUs, a smaller model or shorter sequences"


def suggestion(job: Job, change: Change, room: int, name: str) -> str:
    """Return the flags of a change and the memory that it needs, or nothing if it is not allowed or does not fit."""
    changed = applied(job, change)
    if not change or [*changed.stage.problems(), *changed.stage.common_problems()] or (needed := changed.memory().total) > room:
        return ""
    flags = " ".join(f"--set {name}.{field}={written(value)}" for field, value in new(job.stage, change).items())
    away = changed.memory().offloaded
    return f"`{flags}`, about {gib(needed)}{f', and {gib(away)} of CPU memory per process' if away else ''}"


def changes(job: Job, gpus: int) -> Iterator[Change]:
    """Yield changes of fields, cheapest first."""
    stage, resources = job.stage, job.stage.resources
    sizes: list[Change] = [{}, *({"resources.micro_batch_size": size} for size in smaller(stage))]
    yield from sizes[1:]
    again: Change = {} if resources.gradient_checkpointing else {"resources.gradient_checkpointing": True}
    yield from (again | size for size in sizes)

    least = again | sizes[-1]
    counts = [resources.gpus] if resources.world_size > 1 else [count for count in (2, 4, 8) if count <= gpus]
    for count in counts:
        for strategy in ("zero2", "zero3"):
            sharded: Change = {"resources.gpus": count, "resources.strategy": strategy}
            yield from (sharded, least | sharded)
        if stage.shares_sequences() and not job.architecture.family.windows:
            sharded = least | {"resources.gpus": count, "resources.strategy": "zero3"}
            yield from (sharded | {"resources.sequence_parallel_size": size} for size in job.architecture.sharing[1:] if size <= count)

    yield least | {"resources.strategy": "zero2", "resources.offload": "optimizer"}
    yield from (least | {"resources.strategy": "zero3", "resources.offload": offload} for offload in ("optimizer", "all"))
    fewer = fewer_layers(job)
    yield fewer
    if job.method == "lora" and "method" in type(stage).model_fields:
        yield from ({"resources.strategy": "ddp", "method": "qlora"} | others for others in ({}, least, least | fewer))


def written(value: Any) -> str:
    """Return a value as `--set` takes it."""
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()


def fewer_layers(job: Job) -> Change:
    """Return the change to LoRA on the layers that guides choose when memory is short, with the smallest batches; empty if the model has no
    such layers, or something else is trained."""
    lora = job.stage.adapter_settings()
    if job.method == "full" or lora.kind != "lora" or not job.architecture.targeted(lora.model_copy(update={"target_modules": FEWER})):
        return {}
    sizes = list(smaller(job.stage))
    smallest: Change = {"resources.micro_batch_size": sizes[-1]} if sizes else {}
    return {"resources.gradient_checkpointing": True, "lora.target_modules": FEWER} | smallest


def new(stage: Training, change: Change) -> Change:
    """Return the fields of a change that differ from the stage."""
    return {field: value for field, value in change.items() if reduce(getattr, field.split("."), stage) != value}


def smaller(stage: Training) -> Iterator[int]:
    size: int | None = stage.micro_batch_size()
    while size is not None and (size := stage.smaller_micro_batch(size)) is not None:
        yield size


def applied(job: Job, change: Change) -> Job:
    fields = {field: value for field, value in change.items() if "." not in field}
    for part in ("resources", "lora"):
        inner = {field.partition(".")[2]: value for field, value in change.items() if field.startswith(f"{part}.")}
        fields[part] = getattr(job.stage, part).model_copy(update=inner)
    stage = job.stage.model_copy(update=fields)
    return replace(job, stage=stage, method=change.get("method", job.method))
