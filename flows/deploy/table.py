"""The table of `tuneline deploy`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.text import Text

from flows.deploy.compare import Row
from flows.report.tables import STYLES, print_table, table_of


def deploy_table(rows: Sequence[Row], dry_run: bool) -> None:
    """Print the changes that were made, or would be; the totals go to stderr."""
    table = table_of("what", "name", "action", "details")
    for row in rows:
        changes = "\n".join(f"{each.field}: {_short(each.old)} -> {_short(each.new)}" for each in row.changes)
        details = row.note or (str(row.item) if row.action == "create" else changes)
        table.add_row(row.what, Text(row.name), Text(row.action, STYLES[row.action]), Text(details))
    print_table(table)
    verbs = (
        {"create": "to create", "change": "to change", "delete": "to delete"}
        if dry_run
        else {"create": "created", "change": "changed", "delete": "deleted"}
    )
    counts = {verb: sum(row.action == action for row in rows) for action, verb in verbs.items()}
    print(", ".join(f"{count} {verb}" for verb, count in counts.items() if count) or "nothing to change", file=sys.stderr)


def _short(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
