"""The stage kind `dpo`: preference training on pairs of answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.preferences import PreferenceTraining


class DpoStage(PreferenceTraining):
    """Train on pairs of a chosen and a rejected answer (DPO, arXiv:2305.18290), with TRL and PEFT.

    The reference is the model before the training: the base for a new adapter; base and `adapter` if that is continued; a frozen copy for
    `method: full`. Of each conversation the last answer counts. global_batch_size counts pairs.
    """

    kind: Literal["dpo"]
    also_called: ClassVar = ("preference", "preferencetuning", "preferences", "ipo", "apo", "rpo", "alignment")
    program: ClassVar = "tasks.training.dpo"
    imports: ClassVar = ("tasks.training.checkpoints", "tasks.training.dpo_trainer")
    figures: ClassVar = ("loss", "reward_margin", "reward_accuracy", "eval_reward_accuracy")
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"] = "sigmoid"
    """Loss of a pair: `sigmoid`, DPO's own; `ipo` (arXiv:2310.12036), the difference per token, with beta as its regularization; `hinge`
    (SLiC, arXiv:2305.10425); `robust` (arXiv:2403.00409), for labels of which a share is wrong; `apo_zero`, `apo_down`
    (arXiv:2408.06266), for chosen answers that are better or worse than the model's own."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose answers are expected to be swapped, for `loss_type: robust`."""
    rpo_alpha: float = Field(0.0, ge=0)
    """Weight of the chosen answer's own loss, as in `sft`, which is added (RPO, arXiv:2404.19733); it is averaged over the tokens of the
    chosen answers of a step."""

    def sequences_per_row(self) -> int:
        return 2

    def micro_batch_size(self) -> int:
        """Default to at most 4 pairs, which are 8 sequences."""
        return self.resources.micro_batch_size or self._divisor_up_to(4)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.label_smoothing and self.loss_type != "robust":
            found = f"found label_smoothing with `loss_type: {self.loss_type}`, which ignores it"
            yield Problem("label_smoothing", found, "remove it, or set `loss_type: robust`")
        if self.loss_type == "robust" and not self.label_smoothing:
            hint = "set it, for example `label_smoothing: 0.1`, or `loss_type: sigmoid`"
            yield Problem("loss_type", "found robust without label_smoothing, which is the same as sigmoid", hint)
