"""Gates: requirements on metrics, judged with every figure named."""

from __future__ import annotations

from collections.abc import Mapping

from tuneline.messages import nearest
from tuneline.spec import EvaluateStage, GateStage, Requirement
from tuneline.stages import Stage

Metrics = Mapping[str, float]
ROUNDING = 1e-9  # 0.7 - 0.4 is a little less than 0.3 to a computer


def shown_metrics(stage: Stage, metrics: Metrics) -> dict[str, float]:
    """A Report's metrics under the names of its datasets: `dataset0/exact_match` is `sums/exact_match` to people and gates."""
    if not isinstance(stage, EvaluateStage):
        return dict(metrics)
    names = {f"dataset{i}": name for i, name in enumerate(stage.datasets)}
    parts = ((name.partition("/"), value) for name, value in metrics.items())
    return {f"{names.get(head, head)}{slash}{rest}": value for (head, slash, rest), value in parts}


def judge(gate: GateStage, metrics: Mapping[str, Metrics]) -> tuple[bool, list[str]]:
    """(passed, one line for each requirement). `metrics` by stage name, as `shown_metrics` names them."""
    verdicts = [_judge(requirement, metrics) for requirement in gate.require]
    return all(passed for passed, _ in verdicts), [("met: " if passed else "NOT met: ") + text for passed, text in verdicts]


def _judge(requirement: Requirement, metrics: Mapping[str, Metrics]) -> tuple[bool, str]:
    figures: dict[str, float] = {}
    for stage in (requirement.of, requirement.improves_on, requirement.not_below):
        if stage is not None:
            if requirement.metric not in metrics[stage]:
                known = sorted(name for name in metrics[stage] if not name.endswith("_stderr"))
                near = nearest(requirement.metric, known) or f"it has {', '.join(known)}"
                return False, f"{stage} has no metric {requirement.metric}; {near}"
            figures[stage] = metrics[stage][requirement.metric]
    value = figures[requirement.of]
    what = f"{requirement.metric} of {requirement.of} is {value:.4g}"
    if requirement.at_least is not None:
        return value >= requirement.at_least - ROUNDING, f"{what}, required at least {requirement.at_least:.4g}"
    if requirement.at_most is not None:
        return value <= requirement.at_most + ROUNDING, f"{what}, required at most {requirement.at_most:.4g}"
    if requirement.improves_on is not None:
        other = figures[requirement.improves_on]
        needed = f"required at least {requirement.by:.4g} over {requirement.improves_on}'s {other:.4g} (is {value - other:+.4g})"
        return value - other >= requirement.by - ROUNDING, f"{what}, {needed}"
    assert requirement.not_below is not None
    other = figures[requirement.not_below]
    needed = f"required not below {requirement.not_below}'s {other:.4g} less {requirement.tolerance:.4g} (is {value - other:+.4g})"
    return value >= other - requirement.tolerance - ROUNDING, f"{what}, {needed}"
