"""Exceptions that tuneline raises deliberately.

TunelineError            a message for users, with a hint
├── ConfigError          the file or the call is invalid: all problems at once (exit code 2)
├── StoreError           the store cannot be read or written
└── StageFailed          a stage's program failed; its class decides whether it is retried (exit code 1)
    └── StageStopped     or was stopped with its run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FailureClass = Literal["config", "data", "auth", "disk", "bug", "oom", "transient"]
RETRIED: frozenset[str] = frozenset({"oom", "transient"})


class TunelineError(Exception):
    """An error that users can fix; `str()` is what they see."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class Problem:
    """One problem. A stage does not know its place in a file: its `field` is relative to the stage, and the loader adds the
    rest."""

    field: str
    """Dotted field, may be empty."""
    message: str
    hint: str = ""
    place: str = ""
    """FILE:LINE:COL or a flag."""

    def __str__(self) -> str:
        where = f"{self.place}: {self.field}: " if self.field else f"{self.place}: "
        return where + self.message + (f"\n\nhint: {self.hint}" if self.hint else "")


class ConfigError(TunelineError):
    """All problems of one configuration or call."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n\n".join(str(problem) for problem in self.problems))


class StoreError(TunelineError):
    """The store is unreadable, read-only, full or of a newer schema."""


class StageFailed(TunelineError):
    """A stage's program ended without an artifact. `failure_class` decides whether it is retried, unless it is `final`."""

    def __init__(self, failure_class: FailureClass, message: str, hint: str = "", details: str = "", final: bool = False):
        super().__init__(message, hint)
        self.failure_class, self.details, self.final = failure_class, details, final

    @property
    def retryable(self) -> bool:
        return self.failure_class in RETRIED and not self.final

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str, bool]]:
        return StageFailed, (self.failure_class, self.message, self.hint, self.details, self.final)


class StageStopped(StageFailed):
    """The run was stopped while the stage ran or waited."""

    def __init__(self) -> None:
        super().__init__("transient", "stopped with the run", "run again to resume from the last checkpoint", final=True)
