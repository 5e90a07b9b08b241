"""Evaluate gates: requirements on metrics.

Two evaluations are compared only if they asked the same questions in the same way. Mismatched settings are rejected when the file is
loaded (`incomparable_fields`); mismatched rows fail the gate; permitted differences are printed as notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.gate import GateStage, Requirement
from tuneline.kinds.stage import Stage
from tuneline.wording import nearest
from tuneline.workspace.artifact import Manifest

Metrics = Mapping[str, float]
ROUNDING = 1e-9  # in floating point, 0.7 - 0.4 is less than 0.3
MET, NOTE = "met: ", "note: "


def shown_metrics(stage: Stage, metrics: Metrics) -> dict[str, float]:
    """Return a Report's metrics under the names of its datasets: `dataset0/exact_match` becomes `sums/exact_match`."""
    if not isinstance(stage, EvaluateStage):
        return dict(metrics)
    names = {f"dataset{i}": name for i, name in enumerate(stage.datasets)}
    parts = ((name.partition("/"), value) for name, value in metrics.items())
    return {f"{names.get(head, head)}{slash}{rest}": value for (head, slash, rest), value in parts}


def judge(gate: GateStage, stages: Mapping[str, Stage], manifests: Mapping[str, Manifest]) -> tuple[bool, list[str]]:
    """Return (passed, one line per requirement, then notes). `manifests`: of the stages that have an artifact."""
    metrics = {name: shown_metrics(stages[name], manifest.metrics) for name, manifest in manifests.items()}
    verdicts = [_other_rows(requirement, stages, manifests) or _judge(requirement, metrics) for requirement in gate.require]
    lines = [(MET if passed else "NOT met: ") + text for passed, text in verdicts]
    notes = [NOTE + note for requirement in gate.require for note in _notes(requirement, stages, manifests)]
    return all(passed for passed, _ in verdicts), [*lines, *dict.fromkeys(notes)]


def _judge(requirement: Requirement, metrics: Mapping[str, Metrics]) -> tuple[bool, str]:
    figures: dict[str, float] = {}
    for stage in (requirement.of, requirement.compared_with):
        if stage is not None:
            known = metrics.get(stage, {})
            if requirement.metric not in known:
                names = sorted(name for name in known if not name.endswith("_stderr"))
                near = nearest(requirement.metric, names) or f"it has {', '.join(names)}"
                return False, f"{stage} has no metric {requirement.metric}; {near}"
            figures[stage] = known[requirement.metric]
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


def _compared(requirement: Requirement, stages: Mapping[str, Stage]) -> tuple[EvaluateStage, EvaluateStage] | None:
    """Return the two evaluations if the requirement compares two."""
    one, other = stages[requirement.of], stages.get(requirement.compared_with or "")
    return (one, other) if isinstance(one, EvaluateStage) and isinstance(other, EvaluateStage) else None


def _other_rows(requirement: Requirement, stages: Mapping[str, Stage], manifests: Mapping[str, Manifest]) -> tuple[bool, str] | None:
    """Return a failed verdict if the reports count different rows, for example because a benchmark's data changed in between."""
    if _compared(requirement, stages) is None:
        return None
    subject = requirement.metric.partition("/")[0]
    counts = {}
    for name in (requirement.of, requirement.compared_with or ""):
        rows = shown_metrics(stages[name], manifests[name].info.get("rows", {})) if name in manifests else {}
        counts[name] = rows.get(subject)
    if None in counts.values() or len(set(counts.values())) == 1:
        return None
    compared = " and ".join(f"{count:g} rows in {name}" for name, count in counts.items())
    return False, f"{requirement.metric} is over {compared}: different rows cannot be compared; `--force` both evaluations"


def _notes(requirement: Requirement, stages: Mapping[str, Stage], manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """Yield permitted differences of two evaluations: how they were computed, and a model without a chat template."""
    compared = _compared(requirement, stages)
    if compared is None:
        return
    pair = (requirement.of, requirement.compared_with or "")
    if requirement.metric.partition("/")[0] not in compared[0].datasets and len({stage.apply_chat_template for stage in compared}) == 2:
        with_it, without = pair if compared[0].apply_chat_template else reversed(pair)
        yield f"{with_it} uses the chat template for benchmarks, {without} does not"
    computed = [_computed(stage, manifests.get(name)) for name, stage in zip(pair, compared, strict=True)]
    known = [field for field in computed[0] if computed[0][field] and computed[1][field]]
    if any(computed[0][field] != computed[1][field] for field in known):
        one, other = (" in ".join(str(each[field]) for field in known) for each in computed)
        yield f"{pair[0]} was computed by {one}, {pair[1]} by {other}: they round differently"


def _computed(stage: EvaluateStage, manifest: Manifest | None) -> dict[str, Any]:
    return {"backend": stage.backend, "dtype": manifest.info.get("dtype") if manifest else None}
