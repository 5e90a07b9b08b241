"""The tables that commands print to stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.report.format import age, duration, local_time, number, with_error
from tuneline.config.spec import STAGES
from tuneline.disk import human
from tuneline.estimates.estimate import Estimate
from tuneline.estimates.fit import gib
from tuneline.estimates.memory import Memory
from tuneline.planning.gc import Item
from tuneline.planning.plan import PlanRow
from tuneline.workspace.runs import StageRecord

STYLES = {
    "done": "green",
    "cached": "cyan",
    "failed": "bold red",
    "skipped": "dim",
    "refused": "bold yellow",
    "cancelled": "yellow",
    "killed": "bold red",
    "running": "yellow",
    "run": "yellow",
    "run or cached": "yellow",
    "unknown": "magenta",
    "create": "green",
    "change": "yellow",
    "delete": "red",
    "same": "dim",
    "left": "bold yellow",
}


def list_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print pipelines, or the stages of one, with their state in the last run."""
    shown = [{**row, "started": local_time(row["started"])} if "started" in row else dict(row) for row in rows]
    columns = [name for name in shown[0] if name != "run" and any(row[name] for row in shown)]
    table = table_of(*columns)
    for row in shown:
        table.add_row(*(Text(str(row[name] or ""), STYLES.get(str(row[name]), "")) for name in columns))
    print_table(table)


def runs_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print runs with their times and the states of their stages."""
    table = table_of("run", "pipeline", "state", "started", "took", "stages", "overrides")
    for row in rows:
        ended = datetime.fromisoformat(row["finished"]) if row["finished"] else None
        took = duration((ended - datetime.fromisoformat(row["started"])).total_seconds()) if ended else ""
        stages = ", ".join(f"{count} {status}" for status, count in row["stages"].items())
        state = Text(row["state"], STYLES.get(row["state"], "green"))
        table.add_row(row["run_id"], row["pipeline"], state, local_time(row["started"]), took, stages, Text(" ".join(row["overrides"])))
    print_table(table)


def run_table(records: Sequence[StageRecord]) -> None:
    """Print stages with status, time and key figures; then the folder of each artifact."""
    table = table_of("stage", "kind", "status", "time", "figures")
    for record in records:
        seconds = time_of(record) if record.seconds else ""
        lines = [line for line in record.message.splitlines() if not line.startswith("met: ")]
        shown = figures(record) or (lines[0] if lines else "")
        table.add_row(record.stage, record.kind, Text(record.status, STYLES[record.status]), seconds, Text(shown))
    print_table(table)
    width = max((len(record.stage) for record in records), default=0)
    for record in records:
        if record.artifact:
            gone = "" if os.path.isdir(record.artifact) else "  (no longer in the store)"
            print(f"{record.stage:<{width}}  {os.path.relpath(record.artifact)}{gone}")


def plan_table(rows: Iterable[PlanRow]) -> None:
    table = table_of("stage", "kind", "status", "why")
    for row in rows:
        reasons = "; ".join(f"{reason.code}: {reason.text}" for reason in row.reasons)
        why = "see the error above" if row.problems else reasons  # `plan` has printed it
        if row.checkpoint:
            why += f"; {'cannot resume' if row.refused else 'resumes'} from step {row.checkpoint.step}"
        table.add_row(
            row.stage,
            row.kind,
            Text(row.status, STYLES[row.status]),
            Text(why or ("judged every time" if row.kind == "gate" else f"{row.kind}/{(row.key or '')[:12]}")),
        )
    print_table(table)


def estimate_table(estimates: Mapping[str, Estimate]) -> None:
    """Print the most memory and disk that trainings and merges take, with the larger parts of the memory."""
    if not estimates:
        return
    print()
    table = table_of("estimate", "parameters", "trained", "memory per device, at most", "disk")
    for stage, estimate in estimates.items():
        if estimate.unknown or estimate.memory is None:
            table.add_row(stage, "unknown", "", Text(estimate.unknown), "")
            continue
        trained = f"{estimate.trainable:,} ({estimate.share:.2%})" if estimate.trainable else ""
        disk = human(estimate.disk) if estimate.disk else "unknown"
        table.add_row(stage, f"{estimate.parameters:,}", trained, Text(f"{estimate.device}: {_memory(estimate.memory)}"), disk)
    print_table(table)


def _memory(memory: Memory) -> str:
    states = memory.gradients + memory.optimizer
    parts = {"weights": memory.weights, "training states": states, "activations": memory.activations, "other": memory.other}
    return f"{gib(memory.total)} ({', '.join(f'{name} {size / (1 << 30):.1f}' for name, size in parts.items() if size >= 1 << 26)})" + (
        f"; cpu: {gib(memory.offloaded)} for each process" if memory.offloaded else ""
    )


def gc_table(items: Sequence[Item], dry_run: bool) -> None:
    """Print removed items, then kept ones; the total goes to stderr."""
    table = table_of("kind", "key", "size", "age", "stage", "", "why")
    for item in sorted(items, key=lambda item: not item.removed):
        verb = Text("would remove" if dry_run else "removed", "yellow") if item.removed else Text("kept", "dim")
        table.add_row(
            item.kind,
            item.key if item.kind == "record" else item.key[:12],
            human(item.size),
            age(item.age.total_seconds()),
            item.used_by,
            verb,
            Text(item.why),
        )
    print_table(table)
    gone = [item for item in items if item.removed]
    size = human(sum(item.size for item in gone))
    would = "would be " if dry_run else ""
    print(f"{size} {would}freed, {len(gone)} of {len(items)} {would}removed", file=sys.stderr)


def figures(record: StageRecord) -> str:
    """Return the key metrics of a stage, with standard errors."""
    names = [name for name in (STAGES[record.kind].figures if record.kind in STAGES else ()) if name in record.metrics]
    names = names or [name for name in record.metrics if not name.endswith("_stderr")]
    found = [(name, record.metrics[name], record.metrics.get(f"{name}_stderr")) for name in names]
    subjects = {name.rpartition("/")[0] for name in names}
    shown = {name: name.rpartition("/")[2] if len(subjects) == 1 else name for name in names}
    return ", ".join(with_error(f"{shown[name]} {number(value, 3)}", error) for name, value, error in found)


def time_of(record: StageRecord) -> str:
    """Return the time of all attempts in the run, and their number."""
    return duration(record.seconds) + (f" in {record.attempts} attempts" if record.attempts > 1 else "")


def table_of(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("stage", "kind", "status", "time"))
    return table


def print_table(table: Table) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
