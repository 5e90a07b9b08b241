"""TRL's DPOTrainer with losses and figures that do not depend on micro-batches and processes, and tokens of `tasks.data.masks`.

Only `tasks.training.dpo` imports this, inside `run`, because it subclasses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from trl import DPOTrainer

from tasks.training.row_weighted import MASK, RowWeighted

NO_DIFFERENCE = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0}


class PairTrainer(RowWeighted, DPOTrainer):
    halves = 2
    per_row = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")

    def counts(self, batch: Any) -> torch.Tensor:
        """Return the numbers of pairs, and of tokens of the chosen answers."""
        chosen = batch[MASK].chunk(2)[0]
        return torch.stack([chosen.any(dim=1).sum(), chosen[:, 1:].sum()])

    def totals_of(self, dataset: Any) -> torch.Tensor:
        return torch.tensor([len(dataset), sum(map(len, dataset["chosen_ids"]))])

    def loss_of_masked(self, batch: Any) -> float:
        """Return the loss of pairs without a difference between model and reference, from the formulas in TRL's `_compute_loss`."""
        kind = self.args.loss_type[0]
        return (NO_DIFFERENCE[kind] if kind != "ipo" else 1 / (2 * self.beta) ** 2) * (len(batch[MASK]) // 2 - int(self.counts(batch)[0]))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """Weigh the chosen answers' own loss by token over the step: TRL's is the mean over the tokens of a micro-batch."""
        kind, *added = self.args.loss_type
        if added:
            tokens, pairs = int(self.counts(inputs)[1]), len(inputs[MASK]) // 2
            all_pairs, all_tokens = self._totals.tolist()
            weight = self.args.loss_weights[1] * tokens / all_tokens * all_pairs / pairs
            self.loss_types = [kind, *added] if tokens else [kind]
            self.loss_weights: list[float] = [1.0, weight] if tokens else [1.0]
        return super().compute_loss(model, inputs)
