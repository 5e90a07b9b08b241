"""The table of `tuneline doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from flows.doctor.check import Check
from flows.report.tables import print_table, table_of


def doctor_table(checks: Sequence[Check]) -> None:
    """Print the checks with the problems last, next to the prompt."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = table_of("check", "status", "found", "remedy")
    for check in sorted(checks, key=lambda check: list(styles).index(check.status)):
        table.add_row(check.check, Text(check.status, styles[check.status]), check.message, check.hint)
    print_table(table)
