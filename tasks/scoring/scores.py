"""Scores of a model's answer against its reference, and their averages over rows, as pure functions of text and numbers.

Kept apart from the model so that what a figure means can be read, and tested, in one place. A standard error is left out
where there is a single row: one value says nothing about its spread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.data.marks import said

TAIL = 400  # characters of a prompt kept with each sample


def exact_match(answer: str, reference: str, calls: bool = False) -> float:
    """1.0 where the answer says what the reference says, space around both and thoughts before them aside. Where the two are `calls`
    of tools, the order of keys does not count."""
    one, other = said(answer), said(reference)
    return float(one == other or (calls and with_sorted_keys(one) == with_sorted_keys(other)))


def with_sorted_keys(text: str) -> str:
    """The text with each JSON object in it written in one way, whatever a template has put around them."""
    pieces, position = [], 0
    while (start := text.find("{", position)) >= 0:
        pieces.append(text[position:start].strip())
        try:
            value, position = json.JSONDecoder().raw_decode(text, start)
            pieces.append(json.dumps(value, sort_keys=True))
        except (ValueError, RecursionError):
            pieces.append("{")
            position = start + 1
    return "\n".join([*pieces, text[position:].strip()])


def answer_recall(answer: str, reference: str) -> float:
    """How much of the reference shows up in the model's own words: for what is right, but said otherwise.

    Of a JSON object, the share of its leaf values (null says nothing) that stand in the answer; of any other reference, whether
    it does as a whole. Upper and lower case are one, and a value counts only where words begin and end: 12 is not in 3125.
    """
    answer, reference = said(answer), said(reference)
    try:
        document = json.loads(reference)
    except ValueError:
        document = None
    values = list(_leaves(document)) if isinstance(document, dict) else []
    values = values or [reference.strip()]
    return sum(bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE)) for value in values) / len(values)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif value is not None:
        yield json.dumps(value)


def task_score(answer: str, scorer: dict[str, Any]) -> float:
    """By reasoning-gym's own scorer of the row's task, in [0, 1]."""
    from reasoning_gym.factory import get_score_answer_fn

    return float(get_score_answer_fn(scorer["dataset"])(said(answer), scorer["entry"]))


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error."""
    return ratio(values, [1.0] * len(values))


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float | None]:
    """sum(parts) / sum(wholes), as bits per byte over rows of unequal length, and its standard error by linearisation.

    With wholes of 1 both are those of the mean. lm-eval bootstraps this error, which takes long and is no more exact.
    """
    value, n = sum(parts) / sum(wholes), len(parts)
    if n == 1:
        return value, None
    residuals = sum((part - value * whole) ** 2 for part, whole in zip(parts, wholes, strict=True))
    return value, math.sqrt(residuals * n / (n - 1)) / sum(wholes)


@dataclass
class Sample:
    """One row or benchmark question as it went: the lines of meta/samples.jsonl."""

    of: str
    id: str
    prompt: str
    answer: str
    reference: str
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    metrics: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def add(self, name: str, average: tuple[float, float | None]) -> None:
        self.metrics[name], error = average
        if error is not None:
            self.metrics[f"{name}_stderr"] = error
