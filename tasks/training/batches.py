"""The order of rows in which little is padded: each optimizer step holds the rows that it would hold anyway, the longest first.

A step's rows are cut into micro-batches one after another, and with several processes each takes its turn: so micro-batches hold
rows of like length, and so do those that the processes work on at the same time. As a step's loss is weighted by token over all of
it, it stays what it was. Sorting beyond a step (transformers' `group_by_length`) would change which rows are learned from together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Sampler


class LongestFirst(Sampler[int]):
    """Positions as `sampler` draws them, every `step` of them by falling length: what needs the most memory comes first."""

    def __init__(self, sampler: Sampler[int], lengths: list[int], step: int):
        self.sampler, self.lengths, self.step = sampler, lengths, step

    def __iter__(self) -> Iterator[int]:
        drawn = iter(self.sampler)
        while rows := list(islice(drawn, self.step)):
            yield from longest_first(rows, self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, also where a resumed epoch leaves its first batches out."""
        self.sampler.set_epoch(epoch)


def longest_first(rows: Iterable[int], lengths: list[int]) -> list[int]:
    return sorted(rows, key=lengths.__getitem__, reverse=True)


def lengths(dataset: Any) -> list[int]:
    """Tokens of each row."""
    return [len(ids) for ids in dataset["input_ids"]]
