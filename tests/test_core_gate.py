"""Gates: each condition, met and not met, with every figure named."""

from __future__ import annotations

from typing import Any

import pytest

from tuneline.gate import judge, shown_metrics
from tuneline.spec import EvaluateStage, GateStage

METRICS = {"a": {"m": 0.7, "m_stderr": 0.01}, "b": {"m": 0.4}, "c": {"other": 1.0}}

CASES = [
    ({"at_least": 0.7}, True, "met: m of a is 0.7, required at least 0.7"),
    ({"at_least": 0.71}, False, "NOT met: m of a is 0.7, required at least 0.71"),
    ({"at_most": 0.6}, False, "NOT met: m of a is 0.7, required at most 0.6"),
    ({"improves_on": "b", "by": 0.3}, True, "met: m of a is 0.7, required at least 0.3 over b's 0.4 (is +0.3)"),
    ({"improves_on": "b", "by": 0.31}, False, "NOT met: m of a is 0.7, required at least 0.31 over b's 0.4 (is +0.3)"),
    ({"not_below": "b"}, True, "met: m of a is 0.7, required not below b's 0.4 less 0 (is +0.3)"),
    ({"of": "b", "not_below": "a", "tolerance": 0.1}, False, "NOT met: m of b is 0.4, required not below a's 0.7 less 0.1 (is -0.3)"),
    ({"of": "b", "not_below": "a", "tolerance": 0.3}, True, "met: m of b is 0.4, required not below a's 0.7 less 0.3 (is -0.3)"),
    ({"metric": "n", "at_least": 0}, False, "NOT met: a has no metric n; it has m"),
    ({"not_below": "c"}, False, "NOT met: c has no metric m; it has other"),
]


@pytest.mark.parametrize(("condition", "passes", "line"), CASES, ids=[line for _, _, line in CASES])
def test_a_requirement_is_judged_with_its_figures(condition: dict[str, Any], passes: bool, line: str) -> None:
    gate = GateStage.model_validate({"kind": "gate", "require": [{"metric": "m", "of": "a", **condition}]})
    assert judge(gate, METRICS) == (passes, [line])


def test_one_refusal_is_enough() -> None:
    gate = GateStage.model_validate({"kind": "gate", "require": [{"metric": "m", "of": "a", "at_least": bound} for bound in (0, 1)]})
    passed, lines = judge(gate, METRICS)
    assert not passed
    assert [line[:3] for line in lines] == ["met", "NOT"]


def test_datasets_go_by_their_stages_names() -> None:
    stage = EvaluateStage.model_validate({"kind": "evaluate", "model": "m", "datasets": ["sums", "words"], "benchmarks": ["arc"]})
    metrics = {"dataset0/em": 1.0, "dataset1/em": 2.0, "arc/acc": 3.0}
    assert shown_metrics(stage, metrics) == {"sums/em": 1.0, "words/em": 2.0, "arc/acc": 3.0}
