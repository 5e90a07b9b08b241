"""Builds a stage's optimizer and its learning rate schedule.

transformers builds all by name but Muon, for which torch has only the part that trains matrices. Imports torch at the top because it
subclasses; programs import it inside `run`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from tuneline.errors import StageFailed
from tuneline.kinds.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# Our names -> transformers'. `adamw` is its default; `muon` is made here.
NAMES = {
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "adafactor": "adafactor",
    "lion": "lion_32bit",
}


def arguments(stage: Training) -> dict[str, Any]:
    """Return the optimizer's entries of `TrainingArguments`. The schedule's settings need the number of steps: see OptimizedByStage."""
    given = {"adam_beta1": stage.adam_beta1, "adam_beta2": stage.adam_beta2, "adam_epsilon": stage.adam_epsilon}
    return given | ({"optim": NAMES[stage.optim]} if stage.optim in NAMES else {})


class OptimizedByStage:
    """Makes a trainer use the stage's optimizer and schedule; goes before the trainer among the bases of a class."""

    def __init__(self, *args: Any, stage: Training, **kwargs: Any):
        self._stage = stage
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        trainer: Any = self
        if self._stage.optim == "muon" and trainer.optimizer is None:
            whole = trainer.model if model is None else model
            trainer.optimizer = muon(whole, set(trainer.get_decay_parameter_names(whole)), self._stage)
        return super().create_optimizer(model)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer: Any = self
        trainer.args.lr_scheduler_kwargs = schedule(self._stage, num_training_steps, trainer.args)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]


def schedule(stage: Training, steps: int, arguments: TrainingArguments) -> dict[str, Any]:
    """Return the settings of the stage's schedule by transformers' names. Raises StageFailed(config) if its parts exceed the training."""
    if stage.lr_scheduler_type == "cosine_with_min_lr":
        return {"min_lr_rate": stage.min_lr_ratio}
    if stage.lr_scheduler_type == "polynomial":
        return {"lr_end": stage.min_lr_ratio * stage.learning_rate, "power": stage.lr_power}
    if stage.lr_scheduler_type == "warmup_stable_decay":
        decay = math.ceil(stage.lr_decay_steps * steps) if stage.lr_decay_steps < 1 else int(stage.lr_decay_steps)
        if (warmup := arguments.get_warmup_steps(steps)) + decay > steps:
            message = f"lr_decay_steps: found {decay} steps after {warmup} of warm-up, but the training has only {steps}"
            raise StageFailed("config", message, "lower lr_decay_steps or warmup_steps; values below 1 are shares of all steps")
        return {"num_decay_steps": decay, "min_lr_ratio": stage.min_lr_ratio}
    return {}


class MuonWithAdamW(torch.optim.Optimizer):
    """Trains matrices by Muon and other weights by AdamW. Both share parameter groups and states with this optimizer, so that schedules and
    checkpoints see one."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]):
        """`matrices` and `others` are parameter groups."""
        self._parts = torch.optim.Muon(matrices, **muon), torch.optim.AdamW(others, **adamw)
        super().__init__([*matrices, *others], {"lr": adamw["lr"]})
        self._share()

    def _share(self) -> None:
        both = len(self._parts[0].param_groups)
        self._parts[0].param_groups, self._parts[1].param_groups = self.param_groups[:both], self.param_groups[both:]
        for part in self._parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:
        for part in self._parts:
            part.step()


def muon(model: PreTrainedModel, decaying: set[str], stage: Training) -> MuonWithAdamW:
    """Return Muon for the hidden layers' matrices (torch.optim.Muon says which), at the scale of AdamW's steps."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    vocabulary = {id(parameter) for end in ends for parameter in end.parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {(a, b): [] for a in (True, False) for b in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim == 2 and id(parameter) not in vocabulary, name in decaying].append(parameter)
    matrices, others = (
        [{"params": groups[kind, decays], "weight_decay": stage.weight_decay if decays else 0.0} for decays in (True, False)]
        for kind in (True, False)
    )
    adamw = {"lr": stage.learning_rate, "betas": (stage.adam_beta1, stage.adam_beta2), "eps": stage.adam_epsilon}
    return MuonWithAdamW(matrices, others, {"lr": stage.learning_rate, "adjust_lr_fn": "match_rms_adamw"}, adamw)
