"""Valid combinations of optimizers, schedules and their settings, and advice on values. Each rule names its source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from tuneline.errors import Problem
from tuneline.kinds.adapters import Lora
from tuneline.wording import listed

if TYPE_CHECKING:
    from tuneline.kinds.training import Training

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "lion", "muon"]

BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion")
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit")
WITHOUT_EFFECT = {  # optimizer -> settings that it lacks: transformers/trainer_optimizer.py
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "lion": ("adam_epsilon",),
}
SCHEDULES = {  # setting -> schedules that use it: transformers/optimization.py
    "min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay", "polynomial"),
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_power": ("polynomial",),
}


def optimization_problems(stage: Training) -> Iterator[Problem]:
    yield from _schedule_problems(stage)
    for setting in WITHOUT_EFFECT.get(stage.optim, ()):
        if setting in stage.model_fields_set:
            yield Problem(setting, f"found {setting} with `optim: {stage.optim}`, which has no such setting", "remove it")
    if stage.optim in PAGED and not stage.resources.gpus:
        # bitsandbytes/optim/optimizer.py, get_state_buffer: on CPUs it falls back to states that are not paged.
        hint = f"set `optim: {stage.optim.removeprefix('paged_').removesuffix('_32bit')}`"
        yield Problem("optim", f"found {stage.optim} without GPUs, from whose memory alone it moves states", hint)
    if stage.optim == "muon" and stage.lora.lora_plus_ratio != 1:
        found = f"found {stage.lora.lora_plus_ratio:g} with `optim: muon`, whose steps all have one size"
        yield Problem("lora.lora_plus_ratio", found, "remove it, or choose another optimizer")
    if stage.optim != "adamw" and stage.resources.strategy not in ("ddp", "device_map"):
        # DeepSpeed joins weights into one vector (runtime/zero/stage_1_and_2.py), which Muon and Adafactor cannot train, and converts only
        # Adam's states between layouts (checkpoint/ds_to_universal.py). bitsandbytes' kernels do not know FSDP2's DTensor.
        found = f"found {stage.optim} with {stage.resources.strategy}, expected adamw"
        yield Problem("optim", found, "remove it, or the strategy: adamw's states are sharded over the processes")


def _schedule_problems(stage: Training) -> Iterator[Problem]:
    schedule = stage.lr_scheduler_type
    for setting, users in SCHEDULES.items():
        if setting in stage.model_fields_set and schedule not in users:
            yield Problem(
                setting,
                f"found {setting} with `lr_scheduler_type: {schedule}`, which ignores it",
                f"remove it, or choose {listed(users)}",
            )
    if schedule == "constant" and stage.warmup_steps:
        hint = "set `lr_scheduler_type: constant_with_warmup`"
        yield Problem("lr_scheduler_type", "found constant with warmup_steps, which it ignores", hint)
    if schedule == "cosine_with_min_lr" and not stage.min_lr_ratio:
        yield Problem("lr_scheduler_type", "found cosine_with_min_lr without min_lr_ratio", "set `min_lr_ratio: 0.1`, or choose cosine")
    if schedule == "inverse_sqrt" and not stage.warmup_steps:
        # transformers would assume 10,000 steps: in most trainings the learning rate would not change.
        found = "found inverse_sqrt without warmup_steps, which set how fast it decays"
        yield Problem("lr_scheduler_type", found, "set `warmup_steps: 0.1`")
    if schedule == "warmup_stable_decay" and (shares := stage.warmup_steps + stage.lr_decay_steps) > 1 > max(
        stage.warmup_steps, stage.lr_decay_steps
    ):
        yield Problem("lr_decay_steps", f"found shares of {shares:g} with warmup_steps, expected at most 1", "lower one of them")


def scaling_advice(stage: Training) -> Iterator[Problem]:
    """Yield a warning about a lora_alpha far from those of published guides; nothing is changed."""
    lora = stage.adapter_settings()
    if stage.training_method() == "full" or not isinstance(lora, Lora) or lora.use_rslora:
        return
    if not 0.5 <= (ratio := lora.lora_alpha / lora.r) <= 16:
        # r to 8 r in the guides of ROLL, verl, LLaMA-Factory (2 r) and ms-swift (4 r to 8 r)
        message = f"{lora.lora_alpha:g} is {ratio:g} times r, which scales every update by that"
        yield Problem("lora.lora_alpha", message, f"most guides use 1 to 8 times r, for example `lora_alpha: {2 * lora.r}`")
