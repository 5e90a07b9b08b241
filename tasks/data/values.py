"""Reads and describes values of users' files, and raises BadRow for those that no dataset can hold."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


class BadRow(Exception):
    """Signals a row that does not fit. The caller that knows file and line turns it into StageFailed."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message.encode("utf-8", "backslashreplace").decode()  # names may hold half a surrogate pair
        self.hint = hint


class Number(float):
    """A number of a file, with its original text."""

    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the object of these pairs. Raises ValueError for a duplicate key, of which Python's json would silently keep the last value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_float=Number)
STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def blank(value: Any) -> bool:
    """Return whether a value is absent or without content. 0 and false are values."""
    return value is None or (isinstance(value, str | list | dict) and (not value or (isinstance(value, str) and not value.strip())))


def unpacked(value: Any, where: str) -> Any:
    """Parse messages that are stored as JSON, as often in columnar files; other text is returned unchanged."""
    return parsed(value, where) if isinstance(value, str) and MESSAGES_AS_TEXT.match(value) else value


def parsed(value: Any, where: str) -> Any:
    """Parse lists that are stored as JSON, as often in columnar files."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: found text that is no JSON ({error})") from error


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: found {describe(value)}, expected text")
    if not value.strip():
        raise BadRow(f"{where}: found empty text, expected text with content")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: {half_a_pair(error)}") from error
    return value


def numeral(value: Any) -> Any:
    """Return a number as the file writes it, as text; other values unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    return value.text if isinstance(value, Number) else str(value)


def half_a_pair(error: UnicodeEncodeError) -> str:
    return f"found half a surrogate pair ({error.object[error.start]!r}), expected valid Unicode"


def describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 30 else value[:27] + "...")
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"{'float' if isinstance(value, float) else type(value).__name__} {value}"


def readable(names: Iterable[str]) -> None:
    """Raises BadRow if the name of a column contains half a surrogate pair."""
    try:
        " ".join(names).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"column {error.object!r}: {half_a_pair(error)}") from error


def refuse_unstorable(value: Any, where: str) -> None:
    """Raises BadRow for dates and bytes of a parquet file, NaN, half a surrogate pair, and values nested too deeply."""
    try:
        STRICT.encode(value).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: {half_a_pair(error)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{where}: found a value that JSON cannot hold ({error}), expected text, numbers, lists and objects") from error
