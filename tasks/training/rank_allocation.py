"""Trains AdaLoRA (arXiv:2303.10512) with PEFT's rank allocator, and keeps the allocator's state in each checkpoint.

PEFT saves adapters with the ranks of the moment and without this state, so that no training could resume exactly. Here checkpoints hold
all ranks; the adapter that is handed over has lost those whose singular value is zero, which change nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuneline.errors import StageFailed

NAME = "rank_allocator.safetensors"
MEANS = ("exp_avg_ipt", "exp_avg_unc")  # attributes of PEFT's allocator: tensors by the weight's name
MASK = "mask"  # which ranks of a layer are left, once ranks no longer change


class AllocateRanks(TrainerCallback):
    """Takes ranks after each step of the optimizer. Goes before the callback that completes checkpoints."""

    def __init__(self) -> None:
        self.left: dict[str, list[bool]] | None = None  # ranks of each layer after the last reduction

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if not state.global_step:
            return
        kept = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / NAME, device=str(args.device))
        allocator = model.base_model.rankallocator
        for mean in MEANS:
            setattr(allocator, mean, {name: kept[f"{mean}:{name}"] for name in names(kept, mean)})
        # It keeps a weight's means only beside its last importance, which it computes again in each step.
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in allocator.exp_avg_ipt.items()}
        self.left = {name: kept[f"{MASK}:{name}"].tolist() for name in names(kept, MASK)} or None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        config = model.peft_config["default"]
        config.rank_pattern = self.left
        model.base_model.update_and_allocate(state.global_step + 1)
        self.left, config.rank_pattern = config.rank_pattern, None  # with it PEFT would save reduced ranks

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        allocator = model.base_model.rankallocator
        kept = {f"{mean}:{name}": tensor.cpu() for mean in MEANS for name, tensor in getattr(allocator, mean).items()}
        kept |= {f"{MASK}:{name}": torch.tensor(left) for name, left in (self.left or {}).items()}
        save_file(kept, Path(args.output_dir) / f"checkpoint-{state.global_step}" / NAME)


def names(kept: dict[str, torch.Tensor], part: str) -> list[str]:
    return [name.removeprefix(f"{part}:") for name in kept if name.startswith(f"{part}:")]


def freeze_divisors(model: PeftModel) -> None:
    """Freeze what each layer's update is divided by, its first rank, which PEFT does not save. PEFT would train it where the base is in
    bfloat16: its cast to float32 makes a new parameter (`cast_adapter_dtype` in peft/tuners/tuners_utils.py)."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def drop_empty_ranks(model: PeftModel) -> None:
    """Have PEFT save the adapter without ranks whose singular value is zero. Raises StageFailed(data) if none is left."""
    values = {name: value for name, value in model.base_model.model.named_parameters() if ".lora_E." in name}
    left = {name: (value != 0).flatten().tolist() for name, value in values.items()}
    if not any(map(any, left.values())):
        message = "the training left no rank: every singular value of the adapter is zero"
        raise StageFailed("data", message, "raise learning_rate, or `adalora: {tinit: ...}`, the steps before the first reduction")
    for ranks in left.values():
        ranks[0] |= not any(ranks)  # it stays zero, but PEFT warns of tensors without elements
    model.peft_config["default"].rank_pattern = left


class OrthogonalVectors:
    """Adds AdaLoRA's penalty to a trainer's loss; goes before the trainer among the bases of a class. PEFT adds it to a loss that TRL does
    not use."""

    orth_reg_weight = 0.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        trainer: Any = self
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.orth_reg_weight or not trainer.model.training:
            return loss
        return loss + self.orth_reg_weight * skewness(trainer.model) / trainer.current_gradient_accumulation_steps


def skewness(model: PeftModel) -> torch.Tensor:
    """Return the mean distance of the singular vectors' Gram matrices from the identity (`AdaLoraModel.forward`)."""
    distances = []
    for name, vectors in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            rows = vectors if ".lora_A." in name else vectors.T
            gram = rows @ rows.T
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(distances).mean()
