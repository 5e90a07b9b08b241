"""Computes rewards: each entry of `rewards:` as a function that TRL's GRPOTrainer calls.

TRL calls a function with prompts, completions and the dataset's columns, and takes a list of numbers. Each list is checked before it
is used: TRL itself would silently accept a NaN or None. `check_rows` reports rows without an answer or tests before a model is loaded,
not in the middle of a training.

Left out: asynchronous rewards and reward models.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from tasks.data.marks import said
from tasks.data.rows import Row
from tasks.sandbox import run as sandbox
from tasks.scoring.reward_file import load_function, required_columns
from tasks.scoring.scores import TAIL, exact_match, task_score
from tuneline.errors import StageFailed
from tuneline.kinds.rewards import (
    AnyReward,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    MathEqualReward,
    PythonTestsReward,
    ReasoningGymReward,
)

T = TypeVar("T")
SHOWN = 1000  # characters of a completion in a message
MATH_SECONDS = 2.0  # of CPU time, to read one formula or compare two: a busy machine must not change a reward
FENCED = re.compile(r"```(?:python|py)\b[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
HINTS = {
    "answer": "give each row an `answer`, or remove the reward",
    "scorer": "only rows of a `reasoning_gym` source have a scorer: remove other sources, or the reward",
    "tests": "give each row `tests`: Python that raises if the completion is wrong, as text or a list of texts",
}


@dataclass(frozen=True)
class Completion:
    """One completion, with the fields of its row."""

    prompt: str
    text: str
    said: str
    """The text without the thoughts before it; empty if it was cut off within its thoughts."""
    tokens: int
    id: str
    answer: str | None
    calls: bool
    """Whether the answer calls tools."""
    extra: dict[str, Any]


LARGEST = 1e6  # absolute value of a reward: spreads of larger ones exceed float32


class RewardFunction:
    """A reward as GRPOTrainer calls it. `lacks` says what a row lacks for it, `score` returns a value for each completion."""

    def __init__(
        self,
        label: str,
        score: Callable[[Sequence[Completion]], Any],
        lacks: Callable[[Row], tuple[str, str] | None] = lambda row: None,
        file: Path | None = None,
    ):
        self.__name__ = label  # TRL's name of the metric
        self.score, self.lacks, self.file = score, lacks, file

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        id: list[str],
        answer: list[str | None],
        calls: list[bool],
        said: list[str],
        extra: list[str | dict[str, Any]],
        **unused: Any,  # messages, trainer_state, log_extra, log_metric
    ) -> list[float]:
        """Return the rewards of a batch. The parameters are TRL's: keywords named after the columns of its dataset.

        Raises StageFailed(data) if a value is no finite number, or the function raises.
        """
        extras = [json.loads(item) if isinstance(item, str) else item for item in extra]
        columns = zip(prompts, completions, said, map(len, completion_ids), id, answer, calls, extras, strict=True)
        batch = [Completion(*values) for values in columns]
        try:
            values = self.score(batch)
        except (StageFailed, MemoryError):
            raise
        except BaseException as error:  # also its own SystemExit and KeyboardInterrupt, which never stop this program
            message = f"{type(error).__name__}: {error}{self._place(error)}, on {len(batch)} completions, the first"
            raise self._failed(message, batch[0], details="".join(traceback.format_exception(error))) from error
        if not isinstance(values, list | tuple) or len(values) != len(batch):
            found = f"a list of {len(values)}" if isinstance(values, list | tuple) else type(values).__name__
            raise self._failed(f"returned {found}, expected a list of {len(batch)} numbers, one for each completion, the first", batch[0])
        for value, completion in zip(values, batch, strict=True):
            if not isinstance(value, Real) or not abs(value) <= LARGEST:  # type: ignore[operator]
                raise self._failed(f"returned {value!r}, expected a number from -{LARGEST:g} to {LARGEST:g}, for completion", completion)
        return [float(value) for value in values]

    def _place(self, error: BaseException) -> str:
        """Return the line of the user's file, or else of ours, where the error was raised."""
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename == str(self.file)), frames[-1])
        return f" ({frame.filename}:{frame.lineno})"

    def _failed(self, what: str, completion: Completion, details: str = "") -> StageFailed:
        sample = {"prompt": completion.prompt[-TAIL:], "completion": completion.text[:SHOWN], "answer": completion.answer}
        shown = "".join(f"\n  {name}: {text!r}" for name, text in sample.items())
        hint = f"a reward must accept any text that a model writes: fix {self.file.name}" if self.file else ""
        return StageFailed("data", f"reward `{self.__name__}` {what} of row {completion.id}:{shown}", hint, details)


def reward_functions(rewards: Sequence[AnyReward], files: Mapping[str, Sequence[Path]]) -> list[RewardFunction]:
    """Return the functions in the order of `rewards`; `files` are the request's. Raises StageFailed(config) if a function does not
    exist or cannot be called, and if this machine has no sandbox for `python_tests`."""
    return [reward_function(reward, files.get(f"rewards.{i}.file", ())) for i, reward in enumerate(rewards)]


def reward_function(reward: AnyReward, files: Sequence[Path]) -> RewardFunction:
    match reward:
        case ExactMatchReward():
            return each(reward, lambda one: exact_match(one.said, answer_of(one), one.calls), no_answer)
        case MathEqualReward():
            logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about every formula that takes too long
            warm_math()
            return each(reward, lambda one: math_equal(one.said, answer_of(one)), no_formula)
        case FormatReward():
            pattern = re.compile(reward.pattern, re.DOTALL)
            return each(reward, lambda one: float(pattern.fullmatch(one.text.strip()) is not None))
        case ReasoningGymReward():
            return each(reward, lambda one: task_score(one.said, one.extra["scorer"]), no_scorer)
        case LengthReward():
            span = reward.zero_from - reward.full_up_to
            return each(reward, lambda one: min(1.0, max(0.0, (reward.zero_from - one.tokens) / span)))
        case PythonTestsReward():
            sandbox.check()
            limits = sandbox.Limits(seconds=reward.seconds, cpu_seconds=math.ceil(reward.seconds), memory_bytes=reward.memory_mb << 20)
            return RewardFunction(reward.label, lambda batch: pass_tests(batch, limits), no_tests)
        case FunctionReward():
            return of_user(reward, files)


def each(
    reward: AnyReward, score: Callable[[Completion], float], lacks: Callable[[Row], tuple[str, str] | None] = lambda row: None
) -> RewardFunction:
    return RewardFunction(reward.label, lambda batch: [score(one) for one in batch], lacks)


def check_rows(functions: Iterable[RewardFunction], rows: Sequence[Row]) -> None:
    """Raises StageFailed(data) for the first row that lacks what a reward needs, with the number of such rows. Expects the reference in
    `answer` (`tasks.data.masks.with_reference`)."""
    for function in functions:
        lacking = [(row.id, lack) for row in rows if (lack := function.lacks(row)) is not None]
        if lacking:
            row_id, (what, hint) = lacking[0]
            raise StageFailed(
                "data", f"reward `{function.__name__}`: {len(lacking)} of {len(rows)} rows have {what}, the first {row_id}", hint
            )


# --- what rows must have ----------------------------------------------------------------------------------------------


def no_answer(row: Row) -> tuple[str, str] | None:
    if row.answer is not None:
        return None
    last = len(row.messages) - 1 if row.messages else -1
    if row.messages is not None and row.messages[last]["role"] == "assistant":
        return f"no answer that a model would learn to write (messages[{last}] is not trained on, or not rendered)", HINTS["answer"]
    return "no answer", HINTS["answer"]


def no_formula(row: Row) -> tuple[str, str] | None:
    if (lack := no_answer(row)) is not None:
        return lack
    answer = said(str(row.answer))
    hint = r"write only the formula, as `72`, `\frac{1}{2}` or `$x^2 + 1$`"
    return None if formula(answer) else (f"an answer that math-verify cannot read ({answer[-TAIL:]!r})", hint)


def no_scorer(row: Row) -> tuple[str, str] | None:
    return None if "scorer" in row.extra else ("no scorer of reasoning-gym", HINTS["scorer"])


def no_tests(row: Row) -> tuple[str, str] | None:
    tests = row.extra.get("tests")
    texts = tests if isinstance(tests, list) else [tests]
    right = bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
    return None if right else ("no `tests`" if tests is None else f"`tests` that are not text ({tests!r:.80})", HINTS["tests"])


# --- built in ---------------------------------------------------------------------------------------------------------


def answer_of(completion: Completion) -> str:
    assert completion.answer is not None  # check_rows guarantees it
    return said(completion.answer)


def math_equal(text: str, answer: str) -> float:
    from math_verify import parse, verify

    if exact_match(text, answer):  # math-verify finds no formula in plain words
        return 1.0
    right = formula(answer)
    found: list[Any] = within_limit(lambda: parse(text, parsing_timeout=None), [])
    return float(within_limit(lambda: verify(right, found, timeout_seconds=None), False))


def warm_math() -> None:
    """Load the grammar and most of SymPy with two formulas: on a slow disk this takes longer than the limit."""
    from math_verify import parse, verify

    verify(*(parse(text, parsing_timeout=None) for text in ("$1$", "$x + 1$")), timeout_seconds=None)


@lru_cache(maxsize=100_000)
def formula(answer: str) -> list[Any]:
    """Parse with math-verify. From plain text like `2*x+1` it would only take the number 2, so that is marked as a formula."""
    from math_verify import parse

    marked = any(mark in answer for mark in ("$", r"\boxed", r"\(", r"\["))
    return list(within_limit(lambda: parse(answer if marked else f"${answer}$", parsing_timeout=None), []))


def within_limit(compute: Callable[[], T], otherwise: T) -> T:
    """Return `compute()`, or `otherwise` once it has used MATH_SECONDS of this process's CPU time. math-verify's own limit is
    a wall-clock alarm, which interrupts easy formulas on a busy machine. Python runs signal handlers only in the main thread;
    TRL calls rewards there."""
    from math_verify.errors import TimeoutException

    def end(signum: int, frame: object) -> None:
        raise TimeoutException  # math-verify catches it and returns what it returns for an unreadable formula

    before = signal.signal(signal.SIGPROF, end)
    # Repeats, because Python ignores an exception raised within a callback of the garbage collector or in a `__del__`.
    signal.setitimer(signal.ITIMER_PROF, MATH_SECONDS, MATH_SECONDS / 10)
    try:
        return compute()
    except TimeoutException:
        return otherwise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def pass_tests(batch: Sequence[Completion], limits: sandbox.Limits) -> list[float]:
    return [float(outcome.passed) for outcome in sandbox.run_all([with_tests(one) for one in batch], limits)]


def with_tests(completion: Completion) -> str:
    """Join the last fenced block of Python, else the whole text, with the row's tests. An unclosed fence counts."""
    blocks = FENCED.findall(completion.said)
    tests = completion.extra["tests"]
    return "\n".join([blocks[-1] if blocks else completion.said, *([tests] if isinstance(tests, str) else tests)])


# --- a user's function ------------------------------------------------------------------------------------------------


def of_user(reward: FunctionReward, files: Sequence[Path]) -> RewardFunction:
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no file"
        raise StageFailed("config", f"reward `{reward.label}`: found {found} for {reward.file}, expected one file")
    function = load_function(files[0], reward.function)
    wanted = required_columns(function)

    def score(batch: Sequence[Completion]) -> Any:
        names = {name for one in batch for name in one.extra}
        columns = {name: [one.extra.get(name) for one in batch] for name in sorted(names)}
        columns |= {"id": [one.id for one in batch], "answer": [one.answer for one in batch]}
        return function(prompts=[one.prompt for one in batch], completions=[one.text for one in batch], **columns)

    def lacks(row: Row) -> tuple[str, str] | None:
        absent = [name for name in wanted if name not in row.extra]
        hint = f"{files[0].name} needs it by name; rows have id, answer, `tests` and the columns in `extra`"
        return (f"no column {absent[0]}", hint) if absent else None

    return RewardFunction(reward.label, score, lacks, files[0])
