"""Cron expressions: Prefect runs what `validate` accepts, and `validate` rejects what Prefect rejects or would never run."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as Expanded
from pydantic import ValidationError

from tuneline.config.cron import FIELDS, wrong

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def refused_by_prefect(cron: str) -> bool:
    try:
        CronSchedule(cron=cron, timezone="UTC")
    except ValidationError:
        return True
    return False


def item(number: int) -> st.SearchStrategy[str]:
    field = FIELDS[number]
    value = st.one_of(st.integers(0, field.most + 1).map(str), st.sampled_from([*field.words, "x"]))
    span = st.one_of(st.just("*"), value, st.tuples(value, value).map("-".join))
    stepped = st.tuples(span, st.integers(0, 70).map(str)).map("/".join)
    odd = st.sampled_from(
        ["?", "L", "l", "L5", "5#2", "fri#5", "5#6", "W", "15W", "", "/", "*/", "1-", "-1", "1-5-7", "*-5", "H", "january"]
    )
    return st.one_of(span, span, stepped, odd)


def field(number: int) -> st.SearchStrategy[str]:
    return st.lists(item(number), min_size=1, max_size=3).map(",".join)


@st.composite
def expressions(draw: st.DrawFn) -> str:
    parts = ["0", "2", "*", "*", "*"]
    for number in draw(st.sets(st.integers(0, 4), min_size=1, max_size=3)):
        parts[number] = draw(field(number))
    return " ".join(parts)


@given(expressions())
def test_what_is_accepted_runs(cron: str) -> None:
    found, _ = wrong(cron)
    if refused_by_prefect(cron):
        assert found
    elif not found:
        assert next(Expanded(cron=cron, timezone="UTC")._get_dates_generator(start=NOW), None), cron


RIGHT = [
    "0 2 * * *", "*/15 * * * *", "0 22-4 * * *", "0 2 * nov-feb *", "0 2 * * FRI-mon", "0 2 L * *", "0 2 1,L * *", "0 2 * * L5", "0 2 * * fri#2",
    "0 2 1 * ?", "0 2 ? * 1", "5/10 2 1-10/3 * 1,fri", "0 2 29 2 *", "0 2 31 1 1", "0 2 * * 5,L5", "0 2 * * 0-6,L5", "0 2 * * *,fri#2", "0 2 * * L5,5#2", "0 2 30-3 feb *", "0 2 31 */2 *", "0 2 31 1/2 *",
]  # fmt: skip
WRONG = {
    "0 2 * *": "found '0 2 * *', expected a cron expression such as `0 2 * * *`",
    "@daily": "found '@daily', expected a cron expression such as `0 2 * * *`",
    "*/0 2 * * *": "found `*/0` for the minute in '*/0 2 * * *', expected a step of at least 1",
    "0 25 * * *": "found 25 for the hour in '0 25 * * *', expected 0 to 23",
    "0 2 * foo *": "found foo for the month in '0 2 * foo *', expected 1 to 12, or jan to dec",
    "0 2 * * 1-": "found `1-` for the day of the week in '0 2 * * 1-', expected numbers, ranges, lists and steps, such as `5`, `1-5`, `1,15`, `*/10`",
    "0 2 ?,1 * *": "found `?` for the day of the month in '0 2 ?,1 * *', expected numbers, ranges, lists and steps, such as `5`, `1-5`, `1,15`, `*/10`",
    "0 2 31 2 *": "found day 31 of month 2 in '0 2 31 2 *', expected a date that exists",
    "0 2 31 apr,6 ?": "found day 31 of month apr,6 in '0 2 31 apr,6 ?', expected a date that exists",
    "* 2 * * 0,L5": "found `0,L5` for the day of the week in '* 2 * * 0,L5', expected days of every week, or those of one week of a month",
    "0 2 * * fri-mon,wed#2": "found `fri-mon,wed#2` for the day of the week in '0 2 * * fri-mon,wed#2', expected days of every week, or those of one week of a month",
    "0 2 * * abc#1": "found `abc#1` for the day of the week in '0 2 * * abc#1', expected numbers, ranges, lists and steps, such as `5`, `1-5`, `1,15`, `*/10`",
    "0 2 * * 7-0": "found `7-0`, which Prefect reads as all values for the day of the week in '0 2 * * 7-0', expected `7`",
    "0 2 1-5 * L5": "found `1-5` for the day of the month beside `L5` in '0 2 1-5 * L5', expected `*`",
    "0 2 31 2 1": "found day 31 of month 2 in '0 2 31 2 1', expected a date that exists",
    "0 2 31,L 4 *": "found day 31,L of month 4 in '0 2 31,L 4 *', expected a date that exists",
    "0 2 * * fri-5": "found `fri-5`, which Prefect reads as all values for the day of the week in '0 2 * * fri-5', expected `fri`",
    "0 2 30-31 FEB *": "found day 30-31 of month FEB in '0 2 30-31 FEB *', expected a date that exists",
}  # fmt: skip


@pytest.mark.parametrize("cron", RIGHT)
def test_right(cron: str) -> None:
    assert wrong(cron) == ("", "")
    assert not refused_by_prefect(cron)


@pytest.mark.parametrize("cron", WRONG)
def test_wrong(cron: str) -> None:
    assert wrong(cron)[0] == WRONG[cron]
