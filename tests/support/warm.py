"""Starts programs as children of a warm parent, which has imported what they import: 1 CPU second in place of 7 to 10.

    python tests/support/warm.py ARGV...        as `python ARGV...`, by the parent that WARM_SOCKET names: what `warm_python` is

What a fork hides: a module that a program forgot to import; what a library says or reads from the environment while it is imported
(OMP_*, HF_*, CUDA_VISIBLE_DEVICES, PYTHONHASHSEED: they are the parent's). So each kind and strategy starts as a real process once, and
all do with WARM=0. In /proc a child has the parent's command line and environment. It is no descendant of the client that stands for it:
a watchdog does not see it, so the client passes signals on, and the parent kills it with its descendants when the client goes away.
Kills of whole trees, orphans, and searches in /proc need real processes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "tests" / "support" / "patches"
ZYGOTE = "zygote"  # name of the process that forks a launcher's ranks


class Program:
    """A program that the parent has forked; as much of subprocess.Popen as tests use."""

    def __init__(self, address: str, argv: Sequence[str], folder: Path, environment: Mapping[str, str], files: Sequence[int]):
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        socket.send_fds(self._socket, [b"\n"], files)
        request = {"argv": list(argv), "folder": str(folder), "environment": dict(environment)}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._socket.makefile("rb")
        self.pid = int(self._answer()["pid"])

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the warm parent has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Status of the program, -n if signal n ended it."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._socket, selectors.EVENT_READ)
                if not ready.select(timeout):
                    raise subprocess.TimeoutExpired("a program of the warm parent", timeout or 0)
            self.returncode = int(self._answer()["status"])
        return self.returncode


def start(
    argv: Sequence[str], folder: Path, environment: Mapping[str, str], out: IO[Any], error: IO[Any], real: bool = False
) -> Program | subprocess.Popen[bytes]:
    """Starts `python ARGV...` in a folder: forked, or as a real process."""
    if real or os.environ.get("WARM") == "0":
        return subprocess.Popen([sys.executable, *argv], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error)
    with open(os.devnull, "rb") as nothing:
        return Program(parent(sys.executable), argv, folder, environment, [nothing.fileno(), out.fileno(), error.fileno()])


@functools.cache
def parent(python: str) -> str:
    """Starts the parent, which lives as long as this process, under a Python; returns its address."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = os.path.join(folder.name, "socket")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of the allocator that Arrow brings along
    }  # fmt: skip
    command = [python, str(Path(__file__).with_name("warm_parent.py")), address]
    process = subprocess.Popen(command, cwd=folder.name, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"listening\n"  # it imports after that; who asks before it is done waits

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    return address


def stand_for(argv: list[str]) -> int:
    """Has the parent run a program, as if this process were it."""
    program = Program(os.environ["WARM_SOCKET"], argv, Path.cwd(), os.environ, [0, 1, 2])

    def pass_on(number: int, frame: object) -> None:
        for pid in (program.pid, *descendants(program.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    status = program.wait()
    if status < 0:
        if -status in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Without zygotes, which end with their launcher. From the kernel: no library, so that `start` stays quick."""
    children, found = [], []
    with contextlib.suppress(OSError):  # it has ended
        for task in os.listdir(f"/proc/{pid}/task"):
            children += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            found += [int(child)] * (Path(f"/proc/{child}/comm").read_text() != f"{ZYGOTE}\n") + descendants(int(child))
    return found


if __name__ == "__main__":
    sys.exit(stand_for(sys.argv[1:]))
