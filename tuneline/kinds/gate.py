"""The stage kind `gate`: requirements on metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.fields import ArtifactType, StageRef, Strict
from tuneline.kinds.stage import Stage
from tuneline.wording import shown


class Requirement(Strict):
    """A condition on one metric: at_least, at_most, improves_on (with by), or not_below (with tolerance).

    Two evaluations can be compared only if they ask the same questions. Different limits, few-shot examples, seeds or task files
    (benchmarks), or answer lengths (datasets), are an error. A different backend, compute type or use of the chat template is only noted
    beside the verdict.
    """

    metric: str
    """Name of the metric: `<dataset stage or benchmark>/<metric>`, or a metric of the stage itself."""
    of: StageRef
    """Stage that reports the metric."""
    at_least: float | None = None
    """Minimum value."""
    at_most: float | None = None
    """Maximum value."""
    improves_on: StageRef | None = None
    """Baseline stage: the metric must exceed the baseline's by at least `by`."""
    by: float = Field(0.0, ge=0)
    """Minimum improvement over `improves_on`."""
    not_below: StageRef | None = None
    """Baseline stage: the metric must not be below the baseline's by more than `tolerance`."""
    tolerance: float = Field(0.0, ge=0)
    """Maximum loss against `not_below`."""

    @property
    def compared_with(self) -> str | None:
        """Name of the baseline stage, if the requirement has one."""
        return self.improves_on or self.not_below


class GateStage(Stage):
    """Fail the pipeline unless every requirement holds. Never cached."""

    kind: Literal["gate"]
    also_called: ClassVar = ("check", "assert", "threshold", "condition", "approve")
    require: tuple[Requirement, ...] = Field(min_length=1)
    """Requirements that must all hold."""

    def output_type(self) -> ArtifactType:
        return "Verdict"

    def problems(self) -> Iterator[Problem]:
        choices = ("at_least", "at_most", "improves_on", "not_below")
        for i, requirement in enumerate(self.require):
            given = [name for name in choices if getattr(requirement, name) is not None]
            if len(given) != 1:
                found = f"found {' and '.join(given) or 'no condition'}, expected exactly one of {', '.join(choices)}"
                yield Problem(f"require.{i}", found)
            for other in ("improves_on", "not_below"):
                if getattr(requirement, other) == requirement.of:
                    yield Problem(f"require.{i}.{other}", f"found `{requirement.of}`, the stage itself", "compare it with another stage")
            for extra, owner in (("by", "improves_on"), ("tolerance", "not_below")):
                if extra in requirement.model_fields_set and owner not in given:
                    yield Problem(f"require.{i}.{extra}", f"found {extra} without {owner}")

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        for i, requirement in enumerate(self.require):
            compared = [name for name in (requirement.of, requirement.compared_with) if name and name in stages]
            problems = [stages[name].metric_problem(name, requirement.metric, stages) for name in compared]
            yield from (Problem(f"require.{i}.metric", *found) for found in dict.fromkeys(filter(None, problems)))
            if len(compared) < 2:
                continue
            one, two = compared
            for field in stages[one].incomparable_fields(stages[two], requirement.metric):
                values = [shown(getattr(stages[name], field)) for name in (two, one)]
                found = f"found `{two}` with {field} {values[0]}, `{one}` with {values[1]}, expected the same {field}"
                field_of_gate = f"require.{i}.{'improves_on' if requirement.improves_on else 'not_below'}"
                yield Problem(field_of_gate, f"{found}: otherwise they answer different questions", f"set the same {field} in both")
