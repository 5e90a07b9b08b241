"""Writes the tables of the programs' reports, in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], right: bool = True) -> str:
    """Return a table. `right` aligns all columns but the first, for figures."""
    rule = f"|---{('|---:' if right else '|---') * (len(heads) - 1)}|"
    return "\n".join([_line(heads), rule, *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)
