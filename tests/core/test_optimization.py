"""Optimizers, schedules and speed in the core: refused combinations, advice, keys and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneline.config.load import load
from tuneline.config.spec import STAGES
from tuneline.kinds.sft import SftStage
from tuneline.planning.keys import Outside, key_document

SFT: dict[str, Any] = {"kind": "sft", "model": "base", "dataset": "data", "global_batch_size": 16}
GRPO: dict[str, Any] = SFT | {"kind": "grpo", "rewards": [{"type": "exact_match"}]}
GPU: dict[str, Any] = {"gpus": 1}
WSD = {"lr_scheduler_type": "warmup_stable_decay"}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    "betas of adafactor": (SFT | {"optim": "adafactor", "adam_beta2": 0.99}, {}, "adam_beta2", "found adam_beta2 with `optim: adafactor`", "remove it"),
    "epsilon of lion": (SFT | {"optim": "lion", "adam_epsilon": 1e-6}, {}, "adam_epsilon", "found adam_epsilon with `optim: lion`", "remove it"),
    "paged without GPUs": (SFT | {"optim": "paged_adamw_8bit"}, {}, "optim", "found paged_adamw_8bit without GPUs", "set `optim: adamw_8bit`"),
    "paged 32 bits": (GRPO | {"optim": "paged_adamw_32bit"}, {}, "optim", "found paged_adamw_32bit without GPUs", "set `optim: adamw`"),
    "muon and LoRA+": (SFT | {"optim": "muon", "lora": {"lora_plus_ratio": 16}}, {}, "lora.lora_plus_ratio", "found 16 with `optim: muon`", "another optimizer"),
    "muon and DeepSpeed": (SFT | {"optim": "muon"}, {"gpus": 2, "strategy": "zero2"}, "optim", "found muon with zero2, expected adamw", "sharded"),
    "8 bits and FSDP": (SFT | {"optim": "adamw_8bit"}, {"gpus": 2, "strategy": "fsdp"}, "optim", "found adamw_8bit with fsdp, expected adamw", "sharded"),
    "a warm-up of constant": (SFT | {"lr_scheduler_type": "constant", "warmup_steps": 2}, {}, "lr_scheduler_type", "found constant with warmup_steps", "constant_with_warmup"),
    "a least rate of linear": (SFT | {"min_lr_ratio": 0.1}, {}, "min_lr_ratio", "found min_lr_ratio with `lr_scheduler_type: linear`", "cosine_with_min_lr"),
    "a decay of cosine": (SFT | {"lr_scheduler_type": "cosine", "lr_decay_steps": 5}, {}, "lr_decay_steps", "found lr_decay_steps with `lr_scheduler_type: cosine`", "choose warmup_stable_decay"),
    "a power of cosine": (SFT | {"lr_scheduler_type": "cosine", "lr_power": 2}, {}, "lr_power", "found lr_power with", "choose polynomial"),
    "no least rate": (SFT | {"lr_scheduler_type": "cosine_with_min_lr"}, {}, "lr_scheduler_type", "found cosine_with_min_lr without min_lr_ratio", "min_lr_ratio: 0.1"),
    "a root without warm-up": (SFT | {"lr_scheduler_type": "inverse_sqrt"}, {}, "lr_scheduler_type", "found inverse_sqrt without warmup_steps", "warmup_steps: 0.1"),
    "too large shares": (SFT | WSD | {"warmup_steps": 0.5, "lr_decay_steps": 0.7}, {}, "lr_decay_steps", "found shares of 1.2 with warmup_steps", "lower"),
    "best of nothing": (SFT | {"save_best": True}, {}, "save_best", "found save_best without eval_steps", "eval_steps: 20"),
    "best twice": (SFT | {"save_best": True, "early_stopping": {}, "eval_steps": 5}, {}, "save_best", "found save_best with early_stopping", "remove save_best"),
    "best and checkpoints": (SFT | {"save_best": True, "eval_steps": 5}, {"checkpoint_steps": 3}, "resources.checkpoint_steps", "found checkpoint_steps with save_best", "remove it"),
    "best beyond the end": (SFT | {"save_best": True, "eval_steps": 50, "max_steps": 20}, {}, "eval_steps", "found 50 with save_best and max_steps 20", "lower eval_steps"),
    "noise of shared rows": (SFT | {"neftune_noise_alpha": 5}, {"processes": 2, "sequence_parallel_size": 2}, "sequence_parallel_size", "found 2 with neftune_noise_alpha", "remove one"),
    "labels of shared rows": (SFT | {"label_smoothing": 0.1}, {"processes": 2, "sequence_parallel_size": 2}, "sequence_parallel_size", "found 2 with label_smoothing", "remove one"),
    "flash on a CPU": (SFT, {"attn_implementation": "flash_attention_2"}, "attn_implementation", "found flash_attention_2 without GPUs", "set `auto`"),
    "flash in float32": (SFT | {"dtype": "float32"}, GPU | {"attn_implementation": "flash_attention_3"}, "attn_implementation", "found flash_attention_3 with `dtype: float32`", "bfloat16"),
    "flex on a CPU": (GRPO, {"attn_implementation": "flex_attention"}, "attn_implementation", "found flex_attention without GPUs", "set `auto`"),
    "eager and shared": (SFT, {"processes": 2, "sequence_parallel_size": 2, "attn_implementation": "eager"}, "attn_implementation", "found eager with sequence_parallel_size", "set `auto`"),
    "liger on a CPU": (SFT, {"kernels": "liger"}, "kernels", "found liger without GPUs", "remove it"),
    "offloading on a CPU": (SFT, {"activation_offloading": True}, "activation_offloading", "found activation_offloading without GPUs", "remove it"),
    "offloading of grpo": (GRPO, GPU | {"activation_offloading": True}, "activation_offloading", "found activation_offloading for grpo", "remove it"),
    "compiled shards": (SFT, {"gpus": 2, "strategy": "zero3", "compile": True}, "compile", "found compile with zero3, expected ddp", "remove one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    fields, resources, field, message, hint = REFUSED[name]
    stage = STAGES[fields["kind"]].model_validate(fields | {"resources": resources})
    (found,) = list(stage.problems())
    assert field in found.field
    assert found.message.startswith(message)
    assert hint in found.hint


ADVICE: dict[str, tuple[dict[str, Any], str]] = {
    "a rate of full training": (SFT | {"learning_rate": 1e-5}, "learning_rate: 1e-05 suits the training of all weights"),
    "a large rank and the default alpha": (SFT | {"lora": {"r": 128}}, "lora.lora_alpha: 32 is 0.25 times r"),
    "a large alpha": (SFT | {"lora": {"r": 8, "lora_alpha": 256}}, "lora.lora_alpha: 256 is 32 times r"),
    "a small rank of grpo": (GRPO, "lora.r: 16 may learn slowly"),
    "the same for all weights": (SFT | {"learning_rate": 1e-5, "method": "full"}, ""),
    "lion": (SFT | {"learning_rate": 1e-5, "optim": "lion"}, ""),
    "ranks by root": (SFT | {"lora": {"r": 128, "use_rslora": True}}, ""),
    "grpo of an adapter": (GRPO | {"adapter": "sft"}, ""),
    "as advised": (GRPO | {"learning_rate": 1e-6, "lora": {"r": 32}}, ""),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_is_given_and_changes_nothing(name: str) -> None:
    fields, expected = ADVICE[name]
    stage = STAGES[fields["kind"]].model_validate(fields)
    found = [f"{problem.field}: {problem.message}" for problem in stage.warnings()]
    assert len(found) == (expected != "")
    assert all(message.startswith(expected) for message in found)


def test_our_own_pipelines_follow_the_advice() -> None:
    assert load(Path(__file__).parents[2] / "pipelines.yaml").warnings() == []


def test_what_changes_only_speed_is_in_no_key_and_what_changes_the_result_is() -> None:
    def key(**fields: Any) -> Any:
        stage = SftStage.model_validate(SFT | {"resources": GPU} | fields)
        return key_document(stage, 1, {}, Outside(libraries=dict.fromkeys(stage.libraries_in_key(), "1")))

    fast = {"attn_implementation": "flash_attention_2", "kernels": "liger", "compile": True, "activation_offloading": True}
    assert key(resources=GPU | fast) == key()
    for fields in ({"optim": "muon"}, {"adam_beta2": 0.99}, {"neftune_noise_alpha": 5.0}, {"label_smoothing": 0.1}, WSD):
        assert key(**fields) != key()
    assert key(optim="adamw") == key()
    assert "bitsandbytes" in key(optim="adamw_8bit")["libraries"]
    assert "bitsandbytes" not in key(optim="muon")["libraries"]
