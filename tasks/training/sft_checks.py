"""Checks the rows of a supervised training: their lengths, and that the trainer loses none."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tasks.data.masks import IGNORE_INDEX
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerState


def check_nothing_lost(given: Dataset, used: Dataset, collator: Any) -> None:
    """Raises StageFailed(bug) unless the trainer holds as many rows, tokens and trained tokens as given, and so does a batch of them."""
    if _counts(given) != _counts(used):
        raise StageFailed("bug", f"rows, tokens and trained tokens: found {_counts(used)} in the trainer, expected {_counts(given)}")
    check_batch(used, collator)


def check_batch(used: Dataset, collator: Any) -> None:
    """Raises StageFailed(bug) unless a batch of the first rows holds all their tokens and trained tokens."""
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


def _trained(row: dict[str, Any]) -> int:
    """Count the labels that are trained on: the first token of a row is never predicted."""
    starts = {0, *accumulate(row.get("seq_lengths", ()))}
    return sum(label != IGNORE_INDEX and i not in starts for i, label in enumerate(row["labels"]))


def _counts(dataset: Any) -> tuple[int, int, int]:
    rows = sum(map(len, dataset["seq_lengths"])) if "seq_lengths" in dataset.column_names else len(dataset)
    return rows, sum(map(len, dataset["input_ids"])), sum(sum(label != IGNORE_INDEX for label in labels) for labels in dataset["labels"])
