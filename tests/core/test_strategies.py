"""Rejected combinations of distribution strategies and other settings, and their places."""

from __future__ import annotations

from typing import Any

import pytest

from tuneline.config.spec import STAGES
from tuneline.kinds.grpo import GrpoStage
from tuneline.kinds.sft import SftStage
from tuneline.planning.keys import key_document

SFT: dict[str, Any] = {"kind": "sft", "model": "base", "dataset": "data", "global_batch_size": 16}
GRPO: dict[str, Any] = SFT | {"kind": "grpo", "rewards": [{"type": "exact_match"}]}
DORA: dict[str, Any] = {"lora": {"use_dora": True}}
VLLM: dict[str, Any] = {"rollouts": {"engine": "vllm"}}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    "fsdp on a CPU": (SFT, {"strategy": "fsdp", "processes": 2}, "strategy", "found fsdp without GPUs, where accelerate silently uses ddp", "set `strategy: zero3`, which also shards on CPUs"),
    "fsdp dora": (SFT | DORA, {"strategy": "fsdp", "gpus": 2}, "strategy", "found fsdp with lora.use_dora, which needs unsharded weights", "set `strategy: zero3`, or remove use_dora"),
    "fsdp grpo": (GRPO, {"strategy": "fsdp", "gpus": 2}, "strategy", "found fsdp for grpo, which needs unsharded weights for sampling", "set `strategy: zero3` or `strategy: zero2`"),
    "zero3 vllm": (GRPO | VLLM, {"strategy": "zero3", "gpus": 2}, "strategy", "found zero3 with rollouts by vLLM, expected ddp, zero1 or zero2", "set `strategy: zero2`"),
    "vllm nodes": (GRPO | VLLM, {"nodes": 2, "gpus": 1}, "nodes", "found 2 with rollouts by vLLM, expected 1: the vLLM server runs on one machine", ""),
    "one device for a map": (SFT, {"strategy": "device_map", "gpus": 1}, "strategy", "found device_map with 1 GPU, expected two or more", "remove it: a single device holds all layers"),
    "processes of a map": (SFT, {"strategy": "device_map", "gpus": 2, "processes": 2}, "strategy", "found device_map with several processes or machines, expected one", "remove processes and nodes"),
    "offload to itself": (SFT, {"strategy": "zero2", "processes": 2, "offload": "optimizer"}, "offload", "found optimizer without GPUs: offloading only saves GPU memory", "remove it"),
    "offload of ddp": (SFT, {"gpus": 2, "offload": "optimizer"}, "offload", "found optimizer with ddp, expected zero1, zero2 or zero3", "set `strategy: zero2`"),
    "offload of fsdp": (SFT, {"gpus": 2, "offload": "optimizer", "strategy": "fsdp"}, "offload", "found optimizer with fsdp, expected zero1, zero2 or zero3", "set `offload: all`, which fsdp supports"),
    "offload all of zero2": (SFT, {"gpus": 2, "offload": "all", "strategy": "zero2"}, "offload", "found all with zero2, expected zero3 or fsdp", "set `offload: optimizer`"),
    "more processes than GPUs": (SFT, {"gpus": 2, "processes": 4}, "processes", "found 4 with 2 GPUs for training, expected one process per GPU", "remove it"),
    "fewer processes than GPUs": (SFT, {"gpus": 4, "processes": 1, "strategy": "zero2"}, "processes", "found 1 with 4 GPUs", "remove it"),
    "sharing that does not divide": (SFT, {"processes": 4, "sequence_parallel_size": 3}, "sequence_parallel_size", "found 3 with 4 processes, expected 1, 2, 4", "must be a multiple of it"),
    "sharing by one": (SFT, {"sequence_parallel_size": 2}, "sequence_parallel_size", "found 2 with 1 process, expected 1", "must be a multiple of it"),
    "sharing packed rows": (SFT | {"packing": True}, {"gpus": 2, "sequence_parallel_size": 2}, "sequence_parallel_size", "found 2 with packing, expected 1: packed rows would attend to each other", "set `packing: false`"),
    "sharing for grpo": (GRPO, {"gpus": 2, "sequence_parallel_size": 2}, "sequence_parallel_size", "found 2 for grpo, expected 1", "remove it"),
    "groups that do not divide": (SFT | {"global_batch_size": 3}, {"gpus": 8, "sequence_parallel_size": 4}, "global_batch_size", "found 3, expected multiples of 2 (micro_batch_size 1 x 2 groups of 4 processes)", "the number of processes"),
    "nodes that do not divide": (SFT | {"global_batch_size": 8}, {"nodes": 3}, "global", "found 8, expected multiples of", "change global_batch_size or the number of processes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    fields, resources, field, message, hint = REFUSED[name]
    stage = STAGES[fields["kind"]].model_validate(fields | {"resources": resources})
    (found,) = list(stage.problems())
    assert field in found.field
    assert found.message.startswith(message)
    assert hint in found.hint


@pytest.mark.parametrize(
    ("resources", "world", "launched"),
    [
        ({}, 1, False),
        ({"gpus": 8}, 8, True),
        ({"gpus": 8, "nodes": 2, "strategy": "zero3", "offload": "all"}, 16, True),
        ({"processes": 2, "strategy": "zero1"}, 2, True),
        ({"processes": 1, "strategy": "zero2"}, 1, True),  # DeepSpeed needs torchrun's environment even for one process
        ({"gpus": 4, "strategy": "device_map"}, 1, False),
        ({"gpus": 2, "strategy": "fsdp", "offload": "all", "gradient_checkpointing": True}, 2, True),
        ({"gpus": 8, "nodes": 4, "strategy": "zero3", "sequence_parallel_size": 16}, 32, True),
    ],
)
def test_it_is_allowed_with_so_many_processes(resources: dict[str, Any], world: int, launched: bool) -> None:
    stage = SftStage.model_validate(SFT | {"resources": resources})
    assert not list(stage.problems())
    assert (stage.world_size(), stage.launched()) == (world, launched)


def test_how_a_training_is_shared_is_not_in_its_key() -> None:
    many = {"gpus": 8, "nodes": 2, "strategy": "zero3", "offload": "all", "checkpoint_minutes": 5.0, "checkpoints_kept": 4}
    one, other = (SftStage.model_validate(SFT | {"resources": resources}) for resources in ({"gpus": 1}, many))
    assert key_document(one, 1, {}) == key_document(other, 1, {})


def test_grpo_may_split_what_its_sampling_can_gather() -> None:
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        assert not list(GrpoStage.model_validate(GRPO | {"resources": {"processes": 2, "strategy": strategy}}).problems())
