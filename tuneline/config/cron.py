"""Validate cron expressions as Prefect reads them, and reject dates that never occur."""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass

LEAP_YEAR = 2000
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
HINT = "five fields: minute, hour, day of the month, month, day of the week"


@dataclass(frozen=True)
class Field:
    name: str
    least: int
    most: int
    words: tuple[str, ...] = ()
    """Names of the numbers, starting at `least`."""
    further: str = r"(?!)"
    """Pattern of allowed values other than numbers, ranges and steps."""


FIELDS = (
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of the month", 1, 31, further=r"\?|l"),
    Field("month", 1, 12, MONTHS),
    Field("day of the week", 0, 7, DAYS, rf"\?|l[0-7]|([0-7]|{'|'.join(DAYS)})#[1-5]"),
)


def wrong(cron: str) -> tuple[str, str]:
    """Return (message, hint) about an invalid expression; empty strings if it is valid."""
    parts = cron.split()
    if len(parts) != len(FIELDS):
        return f"found '{cron}', expected a cron expression such as `0 2 * * *`", HINT
    for field, part in zip(FIELDS, parts, strict=True):
        for item in part.lower().split(","):
            if problem := _wrong_item(field, item, alone=item == part.lower()):
                return f"found {problem[0]} for the {field.name} in '{cron}', expected {problem[1]}", problem[2]
    weekday = parts[4].lower()
    if _mixes(weekday):
        found = f"found `{parts[4]}` for the day of the week in '{cron}', expected days of every week, or those of one week of a month"
        return found, "`L5` and `5#2` are days of one week; write a schedule for each"
    if re.search(r"l\d|#", weekday) and parts[2] not in ("*", "?"):  # Prefect would start runs on one of both at most, or never
        found = f"found `{parts[2]}` for the day of the month beside `{parts[4]}` in '{cron}', expected `*`"
        return found, "`L5` and `5#2` are days of one week of a month; write a schedule for each"
    if not _comes(parts[2].lower(), parts[3].lower()):
        return f"found day {parts[2]} of month {parts[3]} in '{cron}', expected a date that exists", "write `L` for the last day of a month"
    return "", ""


def _wrong_item(field: Field, item: str, alone: bool) -> tuple[str, str, str] | None:
    """Return (found, expected, hint), or None if the item is valid."""
    if re.fullmatch(field.further, item) and (alone or item != "?"):
        return None
    parsed = re.fullmatch(r"(\*|(\w+)(?:-(\w+))?)(?:/(\d+))?", item)
    if parsed is None:
        return f"`{item}`", "numbers, ranges, lists and steps, such as `5`, `1-5`, `1,15`, `*/10`", HINT
    for value in filter(None, parsed.group(2, 3)):
        number = _number(field, value)
        if number is None or not field.least <= number <= field.most:
            words = f", or {field.words[0]} to {field.words[-1]}" if field.words else ""
            return value, f"{field.least} to {field.most}{words}", ""
    first, last = (_number(field, value or "") for value in parsed.group(2, 3))
    if first is not None and (first == last or (field.words == DAYS and (first, last) == (7, 0))):
        return f"`{item}`, which Prefect reads as all values", f"`{parsed[2]}`", ""
    return (f"`{item}`", "a step of at least 1", "") if parsed[4] and int(parsed[4]) == 0 else None


def _number(field: Field, value: str) -> int | None:
    if value in field.words:
        return field.least + field.words.index(value)
    return int(value) if value.isdecimal() and value.isascii() else None


def _comes(day: str, month: str) -> bool:
    """Return whether a date has one of the days by number. Prefect looks for it even if `L` or a day of the week would match."""
    if not re.fullmatch(r"(\d+(-\d+)?|l)(,(\d+(-\d+)?|l))*", day):  # with steps
        return True
    ranges = [list(map(int, item.split("-"))) for item in day.split(",") if item != "l"]
    least = min((1 if bounds[0] > bounds[-1] else bounds[0] for bounds in ranges), default=1)
    return any(least <= monthrange(LEAP_YEAR, number)[1] for number in _numbers(FIELDS[3], month))


def _mixes(weekday: str) -> bool:
    """Return whether plain days are listed beside counted ones (`L5`, `fri#2`), which Prefect refuses unless they are the same or all."""
    days: dict[bool, set[int]] = {True: set(), False: set()}  # by whether they are counted
    items = weekday.split(",")
    for item in (item for item in items if item not in ("*", "?")):
        found = re.fullmatch(r"l(\d)|(\w+)#\d", item)
        days[found is not None] |= {number % 7 for number in _numbers(FIELDS[4], (found[1] or found[2]) if found else item)}
    return bool(days[True] and days[False] - days[True]) and (len(days[True] | days[False]) < 7 or "*" in items)


def _numbers(field: Field, part: str) -> set[int]:
    """Return the months of a list of months, or the days of the week, where 0 and 7 are Sunday."""
    found = set[int]()
    for item in part.split(","):
        span, _, step = item.partition("/")
        first, _, last = span.partition("-")
        start = field.least if first == "*" else _number(field, first) or field.least
        end = field.most if first == "*" or (step and not last) else _number(field, last or first) or 0
        end += field.most if end < start else 0  # the range wraps around the end of the year, or of the week
        found |= {(number - 1) % field.most + 1 for number in range(start, end + 1, int(step or 1))}
    return found
