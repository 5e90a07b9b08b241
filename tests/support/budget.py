"""What each test costs: CPU seconds with all its processes, and how many processes it starts.

The suite is bound by CPU, not by waiting, so CPU seconds are the figure that CI's minutes follow. The summary lists the dearest
tests and the sum beside the budget (`cpu_minutes` in the ini file); CONTRIBUTING.md says how to stay below it.
A test that starts a program or the command line as a real process needs the marker `process`: such a start costs 3 to 10 CPU seconds.
With WARM=0 every start is one.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEAREST = 15
TICK = os.sysconf("SC_CLK_TCK")
MARK = "TUNELINE_TESTS"  # in the environment of every process that a test starts, so that detached ones are found, too
OURS = ("tasks", "tasks.launch", "flows", "tuneline")  # `python -m` of these


class Budget:
    def __init__(self):
        self.starts, self.real = 0, list[str]()
        self._mark = f"{MARK}={os.getpid()}".encode()
        self._orphans: dict[tuple[str, str], float] = {}
        self._ended = 0.0  # CPU seconds of orphans that have ended
        os.environ[MARK] = str(os.getpid())
        self._before = 0.0
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "subprocess.Popen":
            return
        self.starts += 1
        command = arguments[1]
        words = [os.fsdecode(word) for word in command] if isinstance(command, list | tuple) else [os.fsdecode(command)]
        for python, option, module in zip(words, words[1:], words[2:], strict=False):
            if option == "-m" and module in OURS and not stands_in(python):
                self.real.append(module)

    def _cpu(self) -> float:
        """CPU seconds so far of this process, of its children, and of what they left running."""
        total = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        orphans: dict[tuple[str, str], float] = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == os.getpid():
                continue
            try:
                if self._mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue  # it has just ended
            seconds = sum(int(field) for field in fields[11:15]) / TICK  # its own, and of children that it has waited for
            total += seconds
            if fields[1] == "1":
                orphans[folder.name, fields[19]] = seconds  # by start time: numbers are given again
        self._ended += sum(seconds for orphan, seconds in self._orphans.items() if orphan not in orphans)
        self._orphans = orphans
        return total + self._ended

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        self.real = []  # what fixtures start is for all who use them, whichever comes first

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        yield
        now = self._cpu()
        item.user_properties += [("cpu", round(max(0.0, now - self._before), 2)), ("starts", self.starts)]
        real, self._before, self.starts, self.real = self.real, now, 0, []
        if real and os.environ.get("WARM") != "0" and not item.get_closest_marker("process"):
            pytest.fail(f"starts {', '.join(real)} as a real process without the marker `process`", pytrace=False)


def stands_in(python: str) -> bool:
    """Whether it is a script in the place of a Python, which starts in milliseconds."""
    try:
        with open(python, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def summarize(terminal: Any, minutes: float) -> None:
    """Prints the dearest tests and the sum. `terminal` is pytest's reporter; under xdist it has the reports of all workers."""
    reports = [report for reports in terminal.stats.values() for report in reports if getattr(report, "when", None) == "teardown"]
    found = {report.nodeid: dict(report.user_properties) for report in reports}
    by_test = {test: properties for test, properties in found.items() if "cpu" in properties}  # without: its teardown failed
    if not by_test:
        return
    terminal.section(f"dearest {DEAREST} of {len(by_test)} tests: CPU seconds, processes started")
    for test, properties in sorted(by_test.items(), key=lambda entry: -entry[1]["cpu"])[:DEAREST]:
        terminal.line(f"{properties['cpu']:8.1f} {properties['starts']:4d}  {test}")
    total = sum(properties["cpu"] for properties in by_test.values())
    terminal.line(f"sum {total / 60:.1f} CPU minutes, budget {minutes:g}; {sum(p['starts'] for p in by_test.values())} processes started")
