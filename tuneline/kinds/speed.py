"""Valid combinations of settings that change a training's speed and memory, but only the rounding of its result. Each rule names its
source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tuneline.errors import Problem

if TYPE_CHECKING:
    from tuneline.kinds.training import Training


def speed_problems(stage: Training) -> Iterator[Problem]:
    resources, attention = stage.resources, stage.resources.attn_implementation
    field = "resources.attn_implementation"
    if attention.startswith("flash") and not resources.gpus:
        yield Problem(field, f"found {attention} without GPUs, for which alone it is written", "set `auto`, or `gpus: 1`")
    elif attention.startswith("flash") and stage.compute_type() == "float32":
        # flash_attn/flash_attn_interface.py: only float16 and bfloat16
        yield Problem(field, f"found {attention} with `dtype: float32`, expected bfloat16", "set `auto`, or `dtype: bfloat16`")
    if attention == "flex_attention" and not resources.gpus:
        # torch/nn/attention/flex_attention.py, _validate_device: on CPUs it has no backward pass.
        yield Problem(field, "found flex_attention without GPUs: on CPUs torch has no backward pass for it", "set `auto`, or `gpus: 1`")
    if attention in ("flex_attention", "eager") and resources.sequence_parallel_size > 1:
        # deepspeed/runtime/sequence_parallel/ulysses_sp.py, register_with_transformers
        found = f"found {attention} with sequence_parallel_size, expected sdpa or flash attention"
        yield Problem(field, found, "set `auto`")
    if resources.kernels and not resources.gpus:
        yield Problem("resources.kernels", f"found {resources.kernels} without GPUs, for which alone its kernels are", "remove it")
    if resources.activation_offloading and not resources.gpus:
        found = "found activation_offloading without GPUs: it only saves GPU memory"
        yield Problem("resources.activation_offloading", found, "remove it")
    if resources.compile and resources.strategy != "ddp":
        # DeepSpeed compiles its engine, FSDP2 each layer: neither has been tried here.
        yield Problem("resources.compile", f"found compile with {resources.strategy}, expected ddp", "remove one of them")
    if resources.compile and resources.sequence_parallel_size > 1:
        yield Problem("resources.compile", "found compile with sequence_parallel_size", "remove one of them")
