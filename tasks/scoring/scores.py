"""Scores a model's answer against its reference, and averages scores over rows, with pure functions of text and numbers.

Separate from the model, so that the meaning of a metric can be read and tested in one place. A single row gets no standard error:
one value has no spread.
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
    """Return 1.0 if the answer equals the reference, without surrounding space and thoughts. If both are `calls` of tools, the order
    of keys does not matter."""
    one, other = said(answer), said(reference)
    return float(one == other or (calls and with_sorted_keys(one) == with_sorted_keys(other)))


def with_sorted_keys(text: str) -> str:
    """Return the text with each JSON object in it written in one form, whatever the template wrote around them."""
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
    """Return how much of the reference appears in the answer, for right answers with other words.

    For a JSON object: the share of its leaf values (except null) that appear in the answer. For any other reference: whether it
    appears as a whole. Ignores case, and matches only whole words: 12 is not in 3125.
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
    """Score with reasoning-gym's own scorer of the row's task, in [0, 1]."""
    from reasoning_gym.factory import get_score_answer_fn

    return float(get_score_answer_fn(scorer["dataset"])(said(answer), scorer["entry"]))


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error."""
    return ratio(values, [1.0] * len(values))


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float | None]:
    """Return sum(parts) / sum(wholes), for example bits per byte over rows of unequal length, and its standard error by linearization.

    With wholes of 1 these are the mean and its standard error. lm-eval bootstraps this error, which is slow and no more exact.
    """
    value, n = sum(parts) / sum(wholes), len(parts)
    if n == 1:
        return value, None
    residuals = sum((part - value * whole) ** 2 for part, whole in zip(parts, wholes, strict=True))
    return value, math.sqrt(residuals * n / (n - 1)) / sum(wholes)


@dataclass
class Sample:
    """The result of one row or benchmark question: a line of meta/samples.jsonl."""

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
