"""The tables of `tuneline status`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from flows.report.format import duration
from flows.report.tables import print_table, table_of
from flows.server.status import OnServer, Working


def status_tables(here: Sequence[Working], there: Sequence[OnServer]) -> None:
    """Print the stages in progress, then the unfinished runs on the server."""
    if here:
        table = table_of("pipeline", "run", "stage", "kind", "time", "progress")
        for row in here:
            progress = Text(row.progress or ("starting" if row.stage else "between stages"))
            table.add_row(row.pipeline, row.run_id, row.stage, row.kind, duration(row.seconds), progress)
        print_table(table)
    if there:
        if here:
            print()
        server = table_of("on the server", "state", "since or at", "pool", "flow run", "message")
        for each in there:
            server.add_row(each.name, each.state, each.since, each.pool, each.flow_run, Text(each.message))
        print_table(server)
