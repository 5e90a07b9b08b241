"""Orders rows so that little is padded: each optimizer step keeps its rows, the longest first.

A step's rows are cut into micro-batches in order, and several processes take them in turn. So the rows of a micro-batch, and the
micro-batches that processes work on at the same time, have similar lengths. The loss of a step does not change, because it is
weighted by token over the whole step. Sorting across steps (transformers' `group_by_length`) would change which rows are learned
from together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Sampler


class LongestFirst(Sampler[int]):
    """Yields positions as `sampler` draws them, each `step` of them by falling length: the largest memory need comes first."""

    def __init__(self, sampler: Sampler[int], lengths: list[int], step: int):
        self.sampler, self.lengths, self.step = sampler, lengths, step

    def __iter__(self) -> Iterator[int]:
        drawn = iter(self.sampler)
        while rows := list(islice(drawn, self.step)):
            yield from longest_first(rows, self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, also when a resumed epoch skips its first batches."""
        self.sampler.set_epoch(epoch)


def longest_first(rows: Iterable[int], lengths: list[int]) -> list[int]:
    return sorted(rows, key=lengths.__getitem__, reverse=True)


def lengths(dataset: Any) -> list[int]:
    """Return the number of tokens of each row."""
    return [len(ids) for ids in dataset["input_ids"]]
