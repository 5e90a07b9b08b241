"""TRL's SFTTrainer with losses that do not depend on how the rows were spread over micro-batches and processes.

TRL weights the training loss by token over a whole step, but averages the validation loss over batches: halving the
micro-batch would change which adapter early stopping keeps. And if an epoch's rows do not divide by the processes, accelerate
repeats rows from its beginning, which would be trained on twice. Because the loss does not depend on the grouping, a step's rows can
be spread over its micro-batches by length; `tasks.training.flattening` decides whether they are padded. Only `tasks.training.sft`
imports this, inside `run`, because it subclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from tasks.training.batches import OrderedSteps, balanced, lengths, longest_first
from tasks.training.loraplus import LoraPlus
from tasks.training.optimizers import OptimizedByStage
from tasks.training.rank_allocation import OrthogonalVectors
from tasks.training.sequences import ForEachOfGroup, part
from tuneline.errors import StageFailed
from tuneline.kinds.sft import Supervised
from tuneline.patches import patch


class TokenWeightedTrainer(OptimizedByStage, LoraPlus, OrthogonalVectors, SFTTrainer):
    data_collator: Any
    label_smoother: Any
    step_tokens = 0
    flattened = False  # whether a micro-batch is one sequence without padding

    def __init__(self, *args: Any, stage: Supervised, **kwargs: Any):
        super().__init__(*args, stage=stage, **kwargs)
        self._resources, self._sharing = stage.resources, stage.resources.sequence_parallel_size
        self.lora_plus_ratio = stage.lora.lora_plus_ratio
        self.orth_reg_weight = stage.adalora.orth_reg_weight if stage.adalora else 0.0
        self._tokens = 0  # of all rows so far, over all processes
        # TRL computes the loss itself, from the hidden states, so the arguments of the model's own forward do not matter.
        patch(self, "model_accepts_loss_kwargs", True)
        self._collate, self.data_collator = self.data_collator, self._collate_and_remember
        self.info: dict[str, str] = {}  # for the manifest
        self._starts: list[int] = []  # of the last batch's packed sequences

    def _collate_and_remember(self, rows: list[dict[str, Any]]) -> Any:
        if "seq_lengths" in rows[0]:
            self._starts = [0, *accumulate(len(row["input_ids"]) for row in rows)][:-1]
        return self._collate(rows)

    def flat_collator(self) -> Any:
        """Return TRL's collator without padding: one sequence, with the rows' positions and boundaries."""
        return replace(self._collate, padding_free=True)

    def flatten(self) -> None:
        """Stop padding micro-batches, also in a dataloader that exists already."""
        self._collate, self.flattened = self.flat_collator(), True

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if not self.args.packing:  # packed sequences are full
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self._resources.data_parallel_size
            of_rows = lengths(self.train_dataset)

            def order(rows: Iterable[int]) -> list[int]:
                return balanced(rows, of_rows, self.args.train_batch_size) if self.flattened else longest_first(rows, of_rows)

            sampler = OrderedSteps(loader.get_sampler(), step, order)
            loader.set_sampler(ForEachOfGroup(sampler, self.args.train_batch_size, self._resources) if self._sharing > 1 else sampler)
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
        return longest_first(range(len(eval_dataset)), lengths(eval_dataset))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the folder first. transformers checks for the best checkpoint's folder before FSDP has made it: processes that check at
        different times would continue with different ones."""
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        batches = (self._without_repeats(batch, self.train_dataset, self._sharing) for batch in epoch_iterator)
        samples, label_tokens = super().get_batch_samples(batches, *args, **kwargs)
        label_tokens = label_tokens // self._sharing  # every process that shares a batch counts it
        self.step_tokens = int(label_tokens)  # over all processes
        self._step = samples
        if self._sharing > 1:
            tokens = sum(batch["attention_mask"].sum() for batch in samples)
            self._tokens += int(self.accelerator.reduce(tokens.to(self.args.device))) // self._sharing
            samples = [part(batch, self.args.process_index % self._sharing, self._sharing) for batch in samples]
        if self.step_tokens == 0:
            raise StageFailed("bug", f"every label is masked in the batch of step {self.state.global_step + 1}")
        return samples, label_tokens

    def step_rows(self) -> list[tuple[int, ...]]:
        """Return the tokens of each row of the step, in this process."""
        found = []
        for batch in self._step:
            if "attention_mask" in batch:
                found += [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
            else:  # joined rows: each begins at position 0
                found += batch["input_ids"][0].tensor_split(row_starts(batch)[1:])
        return [tuple(ids.tolist()) for ids in found]

    def _without_repeats(self, batch: Any, dataset: Any, sharing: int) -> Any:
        """Mask the repeated rows that fill up an epoch's last batches; `sharing` processes have the same ones."""
        if self.accelerator.gradient_state.end_of_dataloader:  # this batch was collated last
            micro = self.args.per_device_train_batch_size
            at_once = micro * self.args.world_size // sharing
            new = len(dataset) % at_once or at_once
            mine = min(max(0, new - micro * (self.args.process_index // sharing)), micro)
            if "attention_mask" in batch:
                batch["labels"][mine:] = -100
            else:  # joined rows
                starts = self._starts if "seq_lengths" in dataset.column_names else row_starts(batch)
                batch["labels"][:, [*starts, batch["labels"].shape[1]][min(mine, len(starts))] :] = -100
        return batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's label tokens, so that a resumed training can sum them over its restored history."""
        if "loss" in logs:
            logs["trained_tokens"] = self.step_tokens
            if self._sharing > 1:
                self._metrics["train"]["num_tokens"] = [self._tokens]  # TRL also counts padding
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self._without_repeats(inputs, self.eval_dataset, sharing=1)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != -100).sum().to(loss.device)
        self._evaluated += torch.stack([loss * tokens, tokens]).double()
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        smoother, self.label_smoother = self.label_smoother, None  # the validation loss compares with that of any training
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.label_smoother = smoother
        loss, tokens = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL would write one with each checkpoint, but artifacts hold no README."""


def row_starts(batch: dict[str, Any]) -> list[int]:
    """Return where the rows of a flattened micro-batch begin."""
    starts: list[int] = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    return starts
