"""Parts of messages and reports: lists, similar names, values as written in the file, markdown tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MOST_LISTED = 30


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return `did you mean ...?`, or nothing if no name is similar."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"did you mean `{matches[0]}`?" if matches else ""


def listed(names: Iterable[str]) -> str:
    shown_names = [short(name) for name in names]
    more = f", ... ({len(shown_names)} in all)" if len(shown_names) > MOST_LISTED else ""
    return ", ".join(shown_names[:MOST_LISTED]) + more or "none (none is defined)"


def short(name: str) -> str:
    """Return a name from the file for a message: one line; names above 70 characters are cut after 60."""
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= 70 else f"{name[:60]}... ({len(name)} characters)"


def shown(value: Any) -> str:
    """Return a value as written in the file, containers by their type."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    return f"'{short(value)}'" if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIO' else 'a'} {noun}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]], right: bool = False) -> str:
    """Return a markdown table. `right`: align all columns but the first to the right, for figures."""
    lines = [heads, [":--", *(["--:" if right else ":--"] * (len(heads) - 1))], *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
