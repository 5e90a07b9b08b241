"""The table of `tuneline doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from flows.doctor.machine import Diagnosis
from flows.report.tables import print_table, table_of


def doctor_table(findings: Sequence[Diagnosis]) -> None:
    """What is wrong last, where one looks first."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = table_of("check", "status", "found", "remedy")
    for finding in sorted(findings, key=lambda finding: list(styles).index(finding.status)):
        table.add_row(finding.check, Text(finding.status, styles[finding.status]), finding.message, finding.remedy)
    print_table(table)
