"""What people see: a run as it goes (stderr) and tables of what came out (stdout).

In a terminal the running stages are lines that redraw themselves; piped, every event is a plain line, progress at most every
ten seconds. `--verbose` shows the programs' own output as well.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tuneline.disk import human
from tuneline.estimates.estimate import Estimate
from tuneline.estimates.fit import gib
from tuneline.estimates.memory import Memory
from tuneline.planning.gc import Item
from tuneline.planning.plan import PlanRow
from tuneline.workspace.protocol import Event
from tuneline.workspace.runs import StageRecord

if TYPE_CHECKING:
    from flows.deploy.compare import Row  # which imports Prefect; `plan` does not
    from flows.doctor.machine import Diagnosis
    from flows.server.status import OnServer, Working

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
    "unknown": "magenta",
    "create": "green",
    "change": "yellow",
    "delete": "red",
    "same": "dim",
    "left": "bold yellow",
}
PLAIN_SECONDS = 10.0  # between two plain progress lines of a stage
FIGURES = {
    "model": ("parameters",),
    "dataset": ("rows_train", "rows_validation", "rows_test"),
    "sft": ("loss", "eval_loss"),
    "grpo": ("reward_first", "reward"),
    "merge": ("max_logit_difference",),
    "quantize": ("perplexity_before", "perplexity", "size_ratio"),
}


class ConsoleReporter:
    """Follows a run on stderr. Called from several threads; rich and single writes are safe for that."""

    def __init__(self, verbose: bool):
        self.verbose, self.console = verbose, Console(stderr=True, soft_wrap=True, highlight=False)
        self.run_id: str | None = None
        self.shows_page = False  # where the server lasts and has a UI
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> ConsoleReporter:
        if self.console.is_terminal:
            columns = TextColumn("[yellow]{task.fields[stage]}"), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn()
            self._bars = Progress(*columns, console=self.console, transient=True)
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def _say(self, stage: str, message: str, style: str = "") -> None:
        stamp = "" if self.console.is_terminal else time.strftime("%H:%M:%S ")
        self.console.print(Text.assemble(stamp, (f"{stage}: ", "bold"), (message, style)))

    def began(self, run_id: str, page: str | None) -> None:
        self.run_id = run_id
        if self.shows_page and page:
            self.console.print(f"page: {page}")

    @contextmanager
    def waiting(self, message: str, takes: str) -> Iterator[None]:
        """Says what is waited for, with the time that has passed where there is a terminal."""
        if not self._bars:
            self.console.print(f"{message} ({takes})")
            yield
            return
        task = self._bars.add_task(takes, total=None, stage=message)
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def started(self, stage: str, message: str) -> None:
        if self._bars:
            self._forget(stage)
            self._tasks[stage] = self._bars.add_task(message, total=None, stage=stage)
        else:
            self._say(stage, f"started ({message})")

    def progress(self, stage: str, event: Event) -> None:
        message = f"{event.step}/{event.total} {event.message or ''}".strip()
        if self._bars and stage in self._tasks:
            self._bars.update(self._tasks[stage], completed=event.step, total=event.total, description=message)
        elif not self._bars and (event.step == event.total or time.monotonic() - self._told.get(stage, 0.0) > PLAIN_SECONDS):
            self._told[stage] = time.monotonic()
            self._say(stage, message)

    def line(self, stage: str, line: str) -> None:
        if self.verbose:
            self._say(stage, line, "dim")

    def warning(self, stage: str, message: str) -> None:
        self._say(stage, f"warning: {message}", "yellow")

    def finished(self, stage: str, record: StageRecord) -> None:
        self._forget(stage)
        took = f" after {_time(record)}" if record.status == "done" and record.seconds >= 0.1 else ""
        message = f"\n{_indented(record.message)}" if "\n" in record.message else f" ({record.message})" if record.message else ""
        self._say(stage, f"{record.status}{took}{message}", STYLES[record.status])

    def _forget(self, stage: str) -> None:
        if self._bars and stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))


def list_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Pipelines, or the stages of one, with what became of them in the last run."""
    shown = [{**row, "started": moment(row["started"])} if "started" in row else dict(row) for row in rows]
    columns = [name for name in shown[0] if name != "run" and any(row[name] for row in shown)]
    table = _table(*columns)
    for row in shown:
        table.add_row(*(Text(str(row[name] or ""), STYLES.get(str(row[name]), "")) for name in columns))
    _print(table)


def runs_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Runs with their times and what became of their stages."""
    table = _table("run", "pipeline", "state", "started", "took", "stages", "overrides")
    for row in rows:
        ended = datetime.fromisoformat(row["finished"]) if row["finished"] else None
        took = _duration((ended - datetime.fromisoformat(row["started"])).total_seconds()) if ended else ""
        stages = ", ".join(f"{count} {status}" for status, count in row["stages"].items())
        state = Text(row["state"], STYLES.get(row["state"], "green"))
        table.add_row(row["run_id"], row["pipeline"], state, moment(row["started"]), took, stages, Text(" ".join(row["overrides"])))
    _print(table)


def status_tables(here: Sequence[Working], there: Sequence[OnServer]) -> None:
    """Stages in progress; then what the server knows of runs that have not ended."""
    if here:
        table = _table("pipeline", "run", "stage", "kind", "time", "progress")
        for row in here:
            progress = Text(row.progress or ("starting" if row.stage else "between two stages"))
            table.add_row(row.pipeline, row.run_id, row.stage, row.kind, _duration(row.seconds), progress)
        _print(table)
    if there:
        if here:
            print()
        server = _table("on the server", "state", "since or at", "pool", "flow run", "message")
        for each in there:
            server.add_row(each.name, each.state, each.since, each.pool, each.flow_run, Text(each.message))
        _print(server)


def moment(started: str | None) -> str:
    """In local time."""
    return datetime.fromisoformat(started).astimezone().strftime("%Y-%m-%d %H:%M:%S") if started else ""


def run_table(records: Sequence[StageRecord]) -> None:
    """Stage, status, time and key figures; then the folder of each artifact."""
    table = _table("stage", "kind", "status", "time", "figures")
    for record in records:
        seconds = _time(record) if record.seconds else ""
        lines = [line for line in record.message.splitlines() if not line.startswith("met: ")]
        shown = figures(record) or (lines[0] if lines else "")
        table.add_row(record.stage, record.kind, Text(record.status, STYLES[record.status]), seconds, Text(shown))
    _print(table)
    width = max((len(record.stage) for record in records), default=0)
    for record in records:
        if record.artifact:
            gone = "" if os.path.isdir(record.artifact) else "  (no longer in the store)"
            print(f"{record.stage:<{width}}  {os.path.relpath(record.artifact)}{gone}")


def plan_table(rows: Iterable[PlanRow]) -> None:
    table = _table("stage", "kind", "status", "why")
    for row in rows:
        why = "; ".join(f"{reason.code}: {reason.text}" for reason in row.reasons)
        if row.checkpoint:
            why += f"; {'cannot resume' if row.refused else 'resumes'} from step {row.checkpoint.step}"
        table.add_row(
            row.stage,
            row.kind,
            Text(row.status, STYLES[row.status]),
            Text(why or ("judged every time" if row.kind == "gate" else f"{row.kind}/{(row.key or '')[:12]}")),
        )
    _print(table)


def estimate_table(estimates: Mapping[str, Estimate]) -> None:
    """What trainings and merges take at most, with the larger parts of the memory."""
    if not estimates:
        return
    print()
    table = _table("estimate", "parameters", "trained", "memory per device, at most", "disk")
    for stage, estimate in estimates.items():
        if estimate.unknown or estimate.memory is None:
            table.add_row(stage, "unknown", "", Text(estimate.unknown), "")
            continue
        trained = f"{estimate.trainable:,} ({estimate.share:.2%})" if estimate.trainable else ""
        disk = human(estimate.disk) if estimate.disk else "unknown"
        table.add_row(stage, f"{estimate.parameters:,}", trained, Text(f"{estimate.device}: {_memory(estimate.memory)}"), disk)
    _print(table)


def _memory(memory: Memory) -> str:
    states = memory.gradients + memory.optimizer
    parts = {"weights": memory.weights, "training states": states, "activations": memory.activations, "other": memory.other}
    return f"{gib(memory.total)} ({', '.join(f'{name} {size / (1 << 30):.1f}' for name, size in parts.items() if size >= 1 << 26)})" + (
        f"; cpu: {gib(memory.offloaded)} for each process" if memory.offloaded else ""
    )


def gc_table(items: Sequence[Item], dry_run: bool) -> None:
    """What goes first, then what stays; the sum on stderr."""
    table = _table("kind", "key", "size", "age", "stage", "", "why")
    for item in sorted(items, key=lambda item: not item.removed):
        verb = Text("would go" if dry_run else "removed", "yellow") if item.removed else Text("kept", "dim")
        table.add_row(
            item.kind,
            item.key if item.kind == "record" else item.key[:12],
            human(item.size),
            _age(item.age.total_seconds()),
            item.used_by,
            verb,
            Text(item.why),
        )
    _print(table)
    gone = [item for item in items if item.removed]
    size = human(sum(item.size for item in gone))
    told = (
        f"{size} would be freed, {len(gone)} of {len(items)} would go" if dry_run else f"{size} freed, {len(gone)} of {len(items)} removed"
    )
    print(told, file=sys.stderr)


def doctor_table(findings: Sequence[Diagnosis]) -> None:
    """What is wrong last, where one looks first."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = _table("check", "status", "found", "remedy")
    for finding in sorted(findings, key=lambda finding: list(styles).index(finding.status)):
        table.add_row(finding.check, Text(finding.status, styles[finding.status]), finding.message, finding.remedy)
    _print(table)


def deploy_table(rows: Sequence[Row], dry_run: bool) -> None:
    """What was done, or would be; the sum on stderr."""
    table = _table("what", "name", "action", "details")
    for row in rows:
        changes = "\n".join(f"{each.field}: {_short(each.old)} -> {_short(each.new)}" for each in row.changes)
        details = row.note or (str(row.item) if row.action == "create" else changes)
        table.add_row(row.what, Text(row.name), Text(row.action, STYLES[row.action]), Text(details))
    _print(table)
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


def figures(record: StageRecord) -> str:
    """The few metrics of a stage that one looks at first, with standard errors."""
    names = [name for name in FIGURES.get(record.kind, ()) if name in record.metrics]
    names = names or [name for name in record.metrics if not name.endswith("_stderr")]
    found = [(name, record.metrics[name], record.metrics.get(f"{name}_stderr")) for name in names]
    subjects = {name.rpartition("/")[0] for name in names}
    shown = {name: name.rpartition("/")[2] if len(subjects) == 1 else name for name in names}
    return ", ".join(f"{shown[name]} {_number(value)}" + (f" ± {error:.2g}" if error else "") for name, value, error in found)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _time(record: StageRecord) -> str:
    """Of all attempts of the run."""
    return _duration(record.seconds) + (f" in {record.attempts} attempts" if record.attempts > 1 else "")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("stage", "kind", "status", "time"))
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
