"""Shares an evaluation among its processes, so that the report is that of one.

Every process runs the whole program and forms the same batches, those of one process: which rows are computed together changes the
last bits of a result. Each process takes the next batch that none has taken, and reads the results of the others. They meet in the
store that torchrun gives them. A process that hangs ends the others after `collective_timeout`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from torch.distributed import HashStore, rendezvous

from tuneline.kinds.stage import Resources

Batch = Sequence[int]
"""Numbers of the requests that are computed together."""


class Share:
    """The part of one process in an evaluation: all of it, if the process is alone."""

    def __init__(self, resources: Resources | None = None):
        self.first, self.calls = True, 0
        self.store: Any = HashStore()
        if resources is not None and resources.world_size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            self.store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=resources.collective_timeout)))
            self.first = rank == 0

    def begin(self) -> None:
        """Begin a list of requests; every process begins the same ones."""
        self.calls += 1

    def add(self, rows: int) -> int:
        """Return how many rows of the list all processes together have computed, these included."""
        return int(self.store.add(f"{self.calls}/rows", rows))

    def compute(self, batches: Sequence[Batch], one: Callable[[int, Batch], list[Any]]) -> list[Any]:
        """Return the result of each request. `one` gets a batch's number and its requests, and returns a result for each, in JSON's
        types."""
        while (number := self.store.add(f"{self.calls}/taken", 1) - 1) < len(batches):
            self.store.set(f"{self.calls}/{number}", json.dumps([list(batches[number]), one(number, batches[number])]))
        found: dict[int, Any] = {}
        for number in range(len(batches)):
            rows, results = json.loads(self.store.get(f"{self.calls}/{number}"))
            found |= dict(zip(rows, results, strict=True))
        return [found[i] for i in range(sum(map(len, batches)))]


def batches_to_write(asked: Sequence[tuple[str, dict[str, Any]]], lengths: Sequence[int], size: int) -> list[Batch]:
    """Return batches of prompts with the same options, the longest prompts first, as lm-eval makes them."""
    alike: dict[str, list[int]] = {}
    for i, (_, options) in enumerate(asked):
        alike.setdefault(json.dumps(options, sort_keys=True), []).append(i)
    ordered = [sorted(group, key=lambda i: (-lengths[i], asked[i][0])) for group in alike.values()]
    return [group[start : start + size] for group in ordered for start in range(0, len(group), size)]


def batches_to_score(requests: Sequence[tuple[Any, list[int], list[int]]], size: int) -> list[Batch]:
    """Return batches of `size` sequences. Those of a context, such as the answers to choose from, are together; the context with the
    longest sequence is first. Requests that differ only in their last token share a sequence."""
    contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        contexts.setdefault(tuple(context), {}).setdefault(tuple(continuation[:-1]), []).append(i)
    ordered = sorted(contexts, key=lambda context: (-len(context) - max(map(len, contexts[context])), context))
    sequences = [alike for context in ordered for alike in contexts[context].values()]
    return [list(chain.from_iterable(sequences[start : start + size])) for start in range(0, len(sequences), size)]
