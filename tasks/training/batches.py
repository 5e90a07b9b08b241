"""Spreads the rows of each optimizer step over its micro-batches, which are cut from its rows in order and taken by the processes in turn.

Flattened micro-batches should hold about as many tokens each, so that none needs more memory than the others and processes work on
equal ones. With padding, rows of similar length should share a micro-batch, so the longest come first. The loss of a step does not
change, because it is weighted by token over the whole step. Sorting across steps (transformers' `group_by_length`) would change which
rows are learned from together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import islice
from typing import Any

from torch.utils.data import Sampler


class OrderedSteps(Sampler[int]):
    """Yields positions as `sampler` draws them, each `step` of them in the order that `order` gives them."""

    def __init__(self, sampler: Sampler[int], step: int, order: Callable[[Iterable[int]], list[int]]):
        self.sampler, self.step, self.order = sampler, step, order

    def __iter__(self) -> Iterator[int]:
        drawn = iter(self.sampler)
        while rows := list(islice(drawn, self.step)):
            yield from self.order(rows)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, also when a resumed epoch skips its first batches."""
        self.sampler.set_epoch(epoch)


def longest_first(rows: Iterable[int], lengths: list[int]) -> list[int]:
    """Return the rows by falling length: the largest memory need comes first."""
    return sorted(rows, key=lengths.__getitem__, reverse=True)


def balanced(rows: Iterable[int], lengths: list[int], size: int) -> list[int]:
    """Return the rows of batches of `size` that hold about as many tokens each. Each row, the longest first, goes to the batch with the
    fewest tokens; the last batch may be smaller."""
    remaining = longest_first(rows, lengths)
    batches: list[list[int]] = [[] for _ in range(0, len(remaining), size)]
    room = [size] * (len(batches) - 1) + [len(remaining) - size * (len(batches) - 1)]
    open_batches = [(0, number) for number in range(len(batches))]
    for row in remaining:
        tokens, number = heappop(open_batches)
        batches[number].append(row)
        if len(batches[number]) < room[number]:
            heappush(open_batches, (tokens + lengths[row], number))
    return [row for batch in batches for row in batch]


def lengths(dataset: Any) -> list[int]:
    """Return the number of tokens of each row."""
    return [len(ids) for ids in dataset["input_ids"]]
