"""Types of rewards: the part of a grpo stage under `rewards:`.

A reward returns a number for each completion. A training maximizes their weighted sum. `tasks.scoring.rewards` computes
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tuneline.errors import Problem
from tuneline.kinds.fields import ExternalPath, Strict


class EveryReward(Strict):
    """Fields of every reward."""

    type: str
    weight: float = Field(1.0, allow_inf_nan=False)
    """Weight of this reward in the sum; a negative weight is a penalty."""

    @property
    def label(self) -> str:
        """Name of its metric."""
        return self.type

    def problems(self) -> Iterator[Problem]:
        if self.weight == 0:
            yield Problem("weight", "found 0, expected a number other than 0", "remove the reward if it should not count")


class ExactMatchReward(EveryReward):
    """Reward 1 if the completion equals the row's answer, ignoring surrounding whitespace, else 0."""

    type: Literal["exact_match"]


class MathEqualReward(EveryReward):
    """Reward 1 if the completion is the row's answer or its last formula is equivalent (1/2 and 0.5), else 0. Uses math-verify."""

    type: Literal["math_equal"]


class FormatReward(EveryReward):
    """Reward 1 if the completion matches a regular expression, else 0."""

    type: Literal["format"]
    pattern: str = Field(min_length=1)
    """Python regular expression that the whole completion must match, ignoring surrounding whitespace; `.` also matches newlines."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        try:
            re.compile(self.pattern, re.DOTALL)
        except (re.error, OverflowError, RecursionError) as error:
            hint = r"in YAML, single quotes keep backslashes: '<answer>\d+</answer>'"
            yield Problem("pattern", f"found '{self.pattern}', expected a regular expression: {error}", hint)


class ReasoningGymReward(EveryReward):
    """Score from 0 to 1 by reasoning-gym's own scorer; only for rows of a `reasoning_gym` source."""

    type: Literal["reasoning_gym"]


class LengthReward(EveryReward):
    """Reward 1 for a short completion, decreasing linearly to 0 for a long one."""

    type: Literal["length"]
    full_up_to: int = Field(ge=0)
    """Maximum length with reward 1, in tokens."""
    zero_from: int = Field(ge=1)
    """Minimum length with reward 0, in tokens."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.zero_from <= self.full_up_to:
            yield Problem("zero_from", f"found {self.zero_from}, expected more than full_up_to, {self.full_up_to}")


class PythonTestsReward(EveryReward):
    """Reward 1 if the completion's Python code passes the row's `tests`, else 0. Runs in a sandbox without network."""

    type: Literal["python_tests"]
    seconds: float = Field(10.0, gt=0, le=600)
    """Time limit for a completion and its tests, in seconds."""
    memory_mb: int = Field(1024, ge=128)
    """Memory limit for a completion and its tests, in MB; includes the interpreter."""


class FunctionReward(EveryReward):
    """Reward returned by your own Python function. `type` may be omitted."""

    type: Literal["function"] = "function"
    file: ExternalPath
    """Python file that defines the function. Its content is in the cache key; modules that it imports are not."""
    function: str = Field(min_length=1)
    """Name of the function: it takes prompts and completions, and returns one number per completion."""

    @property
    def label(self) -> str:
        return self.function


AnyReward = ExactMatchReward | MathEqualReward | FormatReward | ReasoningGymReward | LengthReward | PythonTestsReward | FunctionReward
REWARDS: dict[str, type[EveryReward]] = {
    "exact_match": ExactMatchReward,
    "math_equal": MathEqualReward,
    "format": FormatReward,
    "reasoning_gym": ReasoningGymReward,
    "length": LengthReward,
    "python_tests": PythonTestsReward,
    "function": FunctionReward,
}


def type_of(raw: dict[str, Any]) -> Any:
    """Return the `type` of a raw entry; `function` if it is omitted and a file or function is given."""
    return raw.get("type", "function" if raw.keys() & {"file", "function"} else None)


def _with_type(raw: Any) -> Any:
    return {**raw, "type": type_of(raw)} if isinstance(raw, dict) and type_of(raw) is not None else raw


Reward = Annotated[AnyReward, Field(discriminator="type"), BeforeValidator(_with_type)]


def reward_problems(rewards: Sequence[AnyReward]) -> Iterator[Problem]:
    """Yield problems of a list `rewards:` that types cannot express."""
    first: dict[str, int] = {}
    for i, reward in enumerate(rewards):
        for problem in reward.problems():
            yield Problem(f"rewards.{i}.{problem.field}", problem.message, problem.hint)
        field = f"rewards.{i}.function" if isinstance(reward, FunctionReward) else f"rewards.{i}"
        if (before := first.setdefault(reward.label, i)) != i:
            hint = "rename one function: each has its own metric" if isinstance(reward, FunctionReward) else "remove one of them"
            yield Problem(field, f"found `{reward.label}` twice, first in rewards.{before}", hint)
        if isinstance(reward, FunctionReward) and not reward.function.isidentifier():
            found = f"found '{reward.function}', expected the name of a function"
            yield Problem(field, found, "write only the name here, and the file under `file:`")
