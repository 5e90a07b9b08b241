"""What TRL's trainers on preferences lack: losses and figures that do not depend on how rows were spread over micro-batches.

TRL averages them over each micro-batch, and transformers then over micro-batches and processes: a last, smaller micro-batch would
count as much as a full one, and rows that accelerate repeats to fill up an epoch's last step would be trained twice. Here each row of a
step counts once. Repeated rows are masked: without trained tokens, model and reference agree on them, so they have no gradient, and a
constant loss, which is subtracted. Only trainers of this folder import this, because it is a part of their classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from tasks.training.answers import lengths
from tasks.training.batches import OrderedSteps, longest_first
from tasks.training.loraplus import LoraPlus
from tasks.training.optimizers import OptimizedByStage
from tuneline.kinds.preferences import PreferenceTraining
from tuneline.patches import patch

MASK = "completion_mask"


class RowWeighted(OptimizedByStage, LoraPlus, Trainer):
    """Comes before a trainer of TRL in the bases of a class, which says how many `halves` of a batch hold answers to the same rows."""

    halves = 1
    masks: tuple[str, ...] = (MASK,)
    per_row: tuple[str, ...] = ()
    """Figures of TRL that are means over the rows of a batch."""

    def __init__(self, *args: Any, stage: PreferenceTraining, **kwargs: Any):
        super().__init__(*args, stage=stage, **kwargs)
        self._step: list[Any] = []
        self._totals = torch.zeros(0)
        # Of the last batches accelerate would drop what processes have beyond the rows' number, for figures that have one value each.
        patch(self.accelerator, "gather_for_metrics", self.accelerator.gather)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Take the rows as they are: `tasks.data.masks` has tokenized them."""
        return dataset

    # --- batches ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self._stage.resources.data_parallel_size
        of_rows = lengths(self.train_dataset)
        loader.set_sampler(OrderedSteps(loader.get_sampler(), step, lambda rows: longest_first(rows, of_rows)))
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
        return longest_first(range(len(eval_dataset)), lengths(eval_dataset))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> Any:
        batches = (self._without_repeats(batch, self.train_dataset) for batch in epoch_iterator)
        samples, items = super().get_batch_samples(batches, *args)
        self._step = samples
        self._totals = self.over_processes(sum(self.counts(batch) for batch in samples))
        return samples, items

    def _without_repeats(self, batch: Any, dataset: Any) -> Any:
        if self.accelerator.gradient_state.end_of_dataloader:  # this batch was collated last
            rows = len(batch[MASK]) // self.halves
            at_once = self.args.per_device_train_batch_size * self.args.world_size
            new = len(dataset) % at_once or at_once
            mine = min(max(0, new - rows * self.args.process_index), rows)
            for half in (half for name in self.masks if name in batch for half in batch[name].chunk(self.halves)):
                half[mine:] = 0
        return batch

    def step_rows(self) -> list[tuple[int, ...]]:
        """Return the tokens of each sequence of the step, in this process."""
        pairs = [pair for batch in self._step for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]

    # --- losses -------------------------------------------------------------------------------------------------------

    def counts(self, batch: Any) -> torch.Tensor:
        """Return the numbers of rows of a batch in this process that losses and figures are divided by; the first is that of all rows."""
        return batch[MASK].chunk(self.halves)[0].any(dim=1).sum()[None]

    def over_processes(self, counts: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(counts.to(self.args.device), reduction="sum")

    def loss_of_masked(self, batch: Any) -> float:
        """Return the summed loss of masked rows."""
        raise NotImplementedError

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the batch's part of the step's loss, times the processes and micro-batches that it is averaged over, and weigh TRL's
        figures of the batch in the same way."""
        rows = len(inputs[MASK]) // self.halves
        batches = len(self._step) if model.training else self._eval_batches
        share = rows * self.args.world_size * batches / int(self._totals[0])
        loss = super().compute_loss(model, inputs)
        figures = self._metrics["train" if model.training else "eval"]
        for name in self.per_row:
            figures[name][-1] *= share
        return (loss - self.loss_of_masked(inputs) / rows) * share

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._without_repeats(inputs, self.eval_dataset)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated += loss.double()
        return loss, logits, labels

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._eval_batches, step = len(dataloader), self._totals
        self._totals = self.totals_of(self.eval_dataset)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._totals = step
        loss = self.accelerator.reduce(self._evaluated, reduction="mean") / self._eval_batches
        output.metrics[f"{metric_key_prefix}_loss"] = float(loss)
        return output

    def totals_of(self, dataset: Any) -> torch.Tensor:
        """Return `counts` of all rows of a dataset."""
        return torch.tensor([len(dataset)])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's rows, so that a resumed training can sum them over its restored history."""
        if "loss" in logs:
            logs["rows"] = int(self._totals[0])
        super().log(logs, start_time)

    # --- files --------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the folder first; `TokenWeightedTrainer.save_model` says why."""
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL would write one with each checkpoint, but artifacts hold no README."""
