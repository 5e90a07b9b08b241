"""Show the progress of a run on stderr.

In a terminal the running stages are progress bars. Otherwise every event is a plain line, with progress at most every ten seconds.
`--verbose` also shows the programs' output.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from flows.report.tables import STYLES, time_of
from tuneline.workspace.protocol import Event
from tuneline.workspace.runs import StageRecord

PLAIN_SECONDS = 10.0  # between plain progress lines of a stage


class ConsoleReporter:
    """Shows a run on stderr. Thread-safe: rich and single writes are."""

    def __init__(self, verbose: bool):
        self.verbose, self.console = verbose, Console(stderr=True, soft_wrap=True, highlight=False)
        self.run_id: str | None = None
        self.shows_page = False  # True if the server is lasting and has a UI
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}  # time of the last plain progress line, by stage

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
        """Show what the command waits for, in a terminal with the elapsed time."""
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
        elif not self._bars and (event.step == event.total or time.monotonic() - self._printed.get(stage, 0.0) > PLAIN_SECONDS):
            self._printed[stage] = time.monotonic()
            self._say(stage, message)

    def line(self, stage: str, line: str) -> None:
        if self.verbose:
            self._say(stage, line, "dim")

    def warning(self, stage: str, message: str) -> None:
        self._say(stage, f"warning: {message}", "yellow")

    def finished(self, stage: str, record: StageRecord) -> None:
        self._forget(stage)
        took = f" after {time_of(record)}" if record.status == "done" and record.seconds >= 0.1 else ""
        message = f"\n{_indented(record.message)}" if "\n" in record.message else f" ({record.message})" if record.message else ""
        self._say(stage, f"{record.status}{took}{message}", STYLES[record.status])

    def interrupted(self, error: BaseException) -> None: ...

    def _forget(self, stage: str) -> None:
        if self._bars and stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
