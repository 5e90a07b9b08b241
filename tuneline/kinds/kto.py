"""The stage kind `kto`: preference training on single answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tuneline.kinds.preferences import PreferenceTraining


class KtoStage(PreferenceTraining):
    """Train on single answers that are labeled desirable or not (KTO, arXiv:2402.01306), with TRL and PEFT.

    A pair of a chosen and a rejected answer counts as two rows. The reference is that of `dpo`. Of each conversation the last answer
    counts. How far the model has moved from the reference is measured on answers of other prompts, over all rows of a step.
    """

    kind: Literal["kto"]
    also_called: ClassVar = ("unpaired", "bco", "feedback")
    program: ClassVar = "tasks.training.kto"
    imports: ClassVar = ("tasks.training.checkpoints", "tasks.training.kto_trainer")
    figures: ClassVar = ("loss", "reward_margin", "eval_loss", "eval_reward_margin")
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss of a row: `kto`, relative to how far the model has moved from the reference; `apo_zero_unpaired` (arXiv:2408.06266), without
    that."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of desirable answers."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of the loss of undesirable answers."""
