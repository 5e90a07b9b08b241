"""TRL's KTOTrainer with a loss that does not depend on micro-batches and processes, and tokens of `tasks.data.masks`.

TRL estimates how far the model has moved from the reference (the KL divergence, on answers of other prompts) in each micro-batch, from
answers that it exchanges within micro-batches of an unshuffled dataset. Here each row has its own answer of another prompt, and the
estimate is that of the whole step, made before its first micro-batch by the same forward passes.

Only `tasks.training.kto` imports this, inside `run`, because it subclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from trl import KTOTrainer
from trl.trainer.utils import use_adapter

from tasks.training.row_weighted import MASK, RowWeighted
from tuneline.kinds.kto import KtoStage
from tuneline.patches import patch

WITHOUT_KL = "apo_zero_unpaired"
KL_MASK = "KL_completion_mask"
OF_LABELS = ("chosen", "rejected")  # TRL's names of desirable and undesirable answers


class LabelTrainer(RowWeighted, KTOTrainer):
    masks = (MASK, KL_MASK)
    _stage: KtoStage

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._kl: torch.Tensor | None = None
        self._kl_parts: list[torch.Tensor] = []
        if self._stage.loss_type != WITHOUT_KL:  # TRL was made without, because with it, it refuses to shuffle
            patch(self, "loss_type", self._stage.loss_type)
            patch(self, "calculate_KL", True)

    # --- the estimate of a step ---------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, *args)
        if self.calculate_KL and samples:
            self._kl = self._divergence(samples, int(self._totals[0]))
        return samples, items

    def _divergence(self, batches: Iterable[Any], rows: int) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        model, peft = self.accelerator.unwrap_model(self.model), self.ref_model is None
        for batch in map(self._prepare_inputs, batches):
            with torch.no_grad(), self.compute_loss_context_manager():
                total += super()._compute_kl_logps(self.model_wrapped, batch).sum()
                if peft:
                    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
                        total -= super()._compute_kl_logps(self.model, batch).sum()
                else:
                    total -= super()._compute_kl_logps(self.ref_model, batch).sum()
        return (self.over_processes(total) / rows).clamp(min=0)

    def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
        """TRL takes the difference between the model's and the reference's."""
        return self._kl_parts.pop(0) if self._kl_parts else None

    # --- losses and figures -------------------------------------------------------------------------------------------

    def counts(self, batch: Any) -> torch.Tensor:
        """Return the numbers of rows, and of desirable and undesirable ones."""
        rows, labels = batch[MASK].any(dim=1), batch["label"].bool()
        return torch.stack([rows.sum(), (rows & labels).sum(), (rows & ~labels).sum()])

    def totals_of(self, dataset: Any) -> torch.Tensor:
        desirable = sum(dataset["label"])
        return torch.tensor([len(dataset), desirable, len(dataset) - desirable])

    def loss_of_masked(self, batch: Any) -> float:
        """Return the loss of rows without a difference between model and reference, from the formulas in TRL's `_compute_loss`."""
        moved = self.beta * float(self._kl) if self._kl is not None else 0.0
        masked, labels = ~batch[MASK].any(dim=1), batch["label"].bool()
        desirable, undesirable = (float(torch.sigmoid(torch.tensor(value))) for value in (moved, -moved))
        wanted, unwanted = int((masked & labels).sum()), int((masked & ~labels).sum())
        return float(self.desirable_weight * desirable * wanted + self.undesirable_weight * undesirable * unwanted)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's figures are means over the answers with a label, whose numbers differ between batches: they become sums."""
        if self._kl is not None:
            self._kl_parts = [self._kl[None], torch.zeros_like(self._kl[None])]
        loss = super().compute_loss(model, inputs)
        figures = self._metrics["train" if model.training else "eval"]
        labels = inputs["label"].bool()
        numbers = self.over_processes(torch.stack([labels.sum(), (~labels).sum()])).tolist()
        for name in (f"{of}/{label}" for label, number in zip(OF_LABELS, numbers, strict=True) if number for of in ("rewards", "logps")):
            figures[name][-1] *= numbers[OF_LABELS.index(name.partition("/")[2])]
        return loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        step = self._kl
        if self.calculate_KL:
            batches = (self._without_repeats(batch, self.eval_dataset) for batch in dataloader)
            self._kl = self._divergence(batches, len(self.eval_dataset))
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        self._kl = step
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if figures := self._metrics["train" if self.model.training else "eval"]:
            totals = (self._totals if self.model.training else self.totals_of(self.eval_dataset)).tolist()[1:]
            for label, total in zip(OF_LABELS, totals, strict=True):
                for name in (f"rewards/{label}", f"logps/{label}"):
                    if figures.get(name):
                        figures[name] = [sum(figures[name]) / total]
            figures.pop("rewards/margins", None)
            if all(figures.get(f"rewards/{label}") for label in OF_LABELS):
                figures["rewards/margins"] = [figures["rewards/chosen"][0] - figures["rewards/rejected"][0]]
        super().log(logs, start_time)
