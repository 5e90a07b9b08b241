"""Run programs under the watchdog: pass on log lines and events, enforce the timeout, stop programs, report how they ended.

Signals reach only the flow's main thread, while stages run in pool threads. So nothing relies on a `finally` of a stage: the flow
calls `Supervisor.stop()`, and if the flow is killed, its closed pipes make the watchdogs do the same. If a watchdog is killed, its
program dies with it, but not that program's children: they are found by WORK in their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from tuneline import watchdog
from tuneline.errors import StageFailed
from tuneline.paths import PACKAGES_ROOT
from tuneline.secrets import mask_file, masked
from tuneline.workspace.file_names import EVENTS, FAILURE, LOG, RESULT, TRACKERS
from tuneline.workspace.protocol import Event

WATCHDOG = Path(watchdog.__file__)
POLL = 0.2  # seconds between polls of events and the clock
WORK = "TUNELINE_WORK"  # marks every process that works in a folder, by its environment, as Jenkins marks the processes of a build
STRAY_SECONDS = 10  # after which a killed process must be gone


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `stopped`: we ended it. `oom_killed`: the kernel killed a process of the control group."""

    status: int
    stopped: Literal["timeout", "cancelled"] | None
    oom_killed: bool


@dataclass(frozen=True)
class Program:
    """A program to run."""

    command: list[str]
    environment: Mapping[str, str]
    folder: Path
    """Its current folder, which gets log.txt."""
    timeout: float | None = None
    """Seconds until it is stopped."""
    locks: tuple[int, ...] = ()
    """Descriptors (of the key and the GPUs) that its watchdog inherits, so they are released only when the last process is gone."""


class Supervisor:
    """The programs of one flow process."""

    def __init__(self) -> None:
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def pause(self, seconds: float) -> None:
        """Wait, or return at once if the run is stopped."""
        self._stopping.wait(seconds)

    def stop(self) -> None:
        """End every program with all its descendants, and start no more. Returns once they are gone."""
        self._stopping.set()
        self.end_all()

    def end_all(self) -> None:
        """End every program with all its descendants. Returns once they are gone."""
        with self._lock:
            live = list(self._live)
        for process in live:
            _ask_to_end(process)
        for process in live:
            process.wait()

    def run(
        self, program: Program, on_line: Callable[[str], None] = lambda line: None, on_event: Callable[[Event], None] = lambda event: None
    ) -> Outcome:
        """Run the program until it ends. Lines of stdout and stderr go to `on_line` and to its log.txt."""
        folder = program.folder
        end_strays(folder)
        oom_kills = _oom_kills()
        events = _EventTail(folder / EVENTS)
        with self._lock:
            if self.stopping:
                return Outcome(143, "cancelled", False)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WATCHDOG), *program.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**program.environment, WORK: str(folder)},
                start_new_session=True,
                pass_fds=program.locks,
            )
            self._live.add(process)
        assert process.stdout is not None
        reader = threading.Thread(target=_pump, args=(process.stdout, folder / LOG, on_line), daemon=True)
        reader.start()
        deadline = time.monotonic() + program.timeout if program.timeout else None
        stopped: Literal["timeout", "cancelled"] | None = None
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
                for event in events.new():
                    on_event(event)
                if deadline and time.monotonic() > deadline and stopped is None:
                    stopped = "timeout"
                    _ask_to_end(process)
        finally:
            _close(process)
            process.wait()
            with self._lock:
                self._live.discard(process)
        if process.returncode < 0:  # the watchdog itself was killed
            end_strays(folder)
        reader.join(5)  # a process that escaped could hold the pipe open
        for event in events.new():
            on_event(event)
        for name in (EVENTS, RESULT, FAILURE, TRACKERS):
            mask_file(folder / name)
        if self.stopping:
            stopped = "cancelled"
        return Outcome(process.returncode, stopped, _oom_kills() > oom_kills)


# Prefixes of variables: accelerate reads its precision and strategy from them, torch and CUDA the precision of matrix products.
COMPUTING = ("ACCELERATE_", "FSDP_", "TORCHDYNAMO_", "TORCH_ALLOW_TF32", "NVIDIA_TF32_OVERRIDE")


def program_environment(work: Path, gpus: list[str]) -> dict[str, str]:
    """Return the flow's environment without Prefect's variables, so that no program can reach the server, and without variables that
    would change results but are not part of the key."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", *COMPUTING))}
    return kept | {
        "PYTHONPATH": str(PACKAGES_ROOT),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # some generators of reasoning-gym depend on set order
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "TOKENIZERS_PARALLELISM": "false",
        # A thread that spins while it waits starves other processes on its core: trainings stalled. To sleep at once costs more than
        # most operations take. About 15 microseconds are in between.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "HF_MODULES_CACHE": str(work / "modules"),  # transformers copies a model's own code there before it runs it
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
    }


def end_strays(folder: Path) -> None:
    """Kill the processes that still work in a folder without a watchdog. Raises StageFailed if one cannot be killed."""
    deadline = time.monotonic() + STRAY_SECONDS
    while strays := _working_in(folder):
        if time.monotonic() > deadline:
            numbers = ", ".join(str(pid) for pid in strays)
            raise StageFailed("transient", f"processes of an earlier attempt cannot be killed: {numbers}", "kill them, then run again")
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _working_in(folder: Path) -> list[int]:
    mark, found = f"{WORK}={folder}".encode(), []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):  # gone, or another user's; a zombie has no environment
            if name.isdigit() and mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended already
        process.stdin.write(b"e")
        process.stdin.flush()


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _pump(stream: IO[bytes], log: Path, on_line: Callable[[str], None]) -> None:
    """Copy output to the log and pass whole lines to `on_line`. Of a progress bar, redrawn by carriage returns, pass the last state."""
    with stream, log.open("ab", buffering=0) as file:
        for raw in map(masked, stream):
            with contextlib.suppress(OSError):  # disk full: the log ends here, the program runs on until it meets the same error
                file.write(raw)
            line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
            if line.strip():
                on_line(line)


class _EventTail:
    """Reads the whole lines appended to events.jsonl since the last call. Skips lines that a killed program left unfinished."""

    def __init__(self, path: Path):
        self._path, self._position = path, path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[Event]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                try:
                    yield Event.model_validate_json(masked(line))
                except ValidationError:
                    continue


def _oom_kills() -> int:
    """Return how many processes the kernel has OOM-killed in this control group (v2), or 0 if unknown."""
    try:
        group = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        lines = Path(f"/sys/fs/cgroup{group}/memory.events").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, StopIteration):
        return 0
