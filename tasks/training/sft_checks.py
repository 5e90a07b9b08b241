"""Checks the rows of a supervised training: their lengths, that the trainer loses none, and that packed ones are kept apart."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tasks.data.masks import IGNORE_INDEX
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerState

    from tasks.training.sft_trainer import TokenWeightedTrainer

BORDER = 4  # tokens of a packed row that are compared, to see whether it attends to the previous row


def check_nothing_lost(given: Dataset, used: Dataset, collator: Any) -> None:
    """Raises StageFailed(bug) unless the trainer, and a batch that it makes, hold as many rows, tokens and trained tokens as given."""
    if _counts(given) != _counts(used):
        raise StageFailed("bug", f"rows, tokens and trained tokens: found {_counts(used)} in the trainer, expected {_counts(given)}")
    rows = [used[i] for i in range(min(len(used), 4))]
    batch = collator(rows)
    size = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
    expected = sum(len(row["input_ids"]) for row in rows), sum(_trained(row) for row in rows)
    found = int(size), int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    if found != expected:
        raise StageFailed("bug", f"tokens and trained tokens: found {found} in the first batch, expected {expected}")


def check_every_row_trained(train: Dataset, state: TrainerState) -> None:
    """Raises StageFailed(bug) unless each full epoch trained on every token, except rows' first tokens, which are never predicted."""
    wanted = int(state.epoch + 1e-6) * sum(label != IGNORE_INDEX for labels in train["labels"] for label in labels[1:])
    trained = sum(entry.get("trained_tokens", 0) for entry in state.log_history)
    if trained < wanted:
        raise StageFailed("bug", f"{state.epoch:.2f} epochs: found {trained:,} trained tokens, expected {wanted:,} or more")


def check_rows_apart(trainer: TokenWeightedTrainer) -> None:
    """Raises StageFailed(config) unless packed rows have the same hidden states without the row before them."""
    import torch

    sequence = next((sequence for sequence in trainer.train_dataset if len(sequence["seq_lengths"]) > 1), None)
    if sequence is None:
        return
    first = sequence["seq_lengths"][0]
    model = trainer.model_wrapped
    model.eval()
    hidden = []
    for rows in (sequence, {"seq_lengths": sequence["seq_lengths"][1:], "input_ids": sequence["input_ids"][first:]}):
        batch = trainer.data_collator([rows])
        del batch["labels"]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            try:
                output = model(**trainer._prepare_inputs(batch), output_hidden_states=True, logits_to_keep=1)
            except ValueError as error:  # some layers separate rows only in kernels that this runtime lacks
                raise StageFailed("config", f"packing: {error}", "set `packing: false`") from error
            hidden.append(output.hidden_states[-1].float())
    # What a state carries over the border (Mamba), or attention by distance admits (Bloom), fades within a few tokens.
    packed, alone = (states[:, :BORDER] for states in (hidden[0][:, first:], hidden[1]))
    if (packed - alone).abs().mean() > 0.1 * alone.abs().mean():  # rounding of bfloat16 is smaller
        raise StageFailed("config", "packing: found a base model whose packed rows attend to one another", "set `packing: false`")


def _trained(row: dict[str, Any]) -> int:
    """Count the labels that are trained on: the first token of a row is never predicted."""
    starts = {0, *accumulate(row.get("seq_lengths", ()))}
    return sum(label != IGNORE_INDEX and i not in starts for i, label in enumerate(row["labels"]))


def _counts(dataset: Any) -> tuple[int, int, int]:
    rows = sum(map(len, dataset["seq_lengths"])) if "seq_lengths" in dataset.column_names else len(dataset)
    return rows, sum(map(len, dataset["input_ids"])), sum(sum(label != IGNORE_INDEX for label in labels) for labels in dataset["labels"])
