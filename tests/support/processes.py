"""What a test waits for, and which processes it has left."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 900.0  # seconds for what comes in a moment, on a machine where anything may take its time


def until(found: Callable[[], Any], process: subprocess.Popen[Any] | None = None, seconds: float = PATIENCE) -> Any:
    """Waits for something, and returns it. An error where `process`, which is to bring it about, ends before."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value


def marked(mark: str) -> list[int]:
    """Processes that carry MARK=<mark> in their environment."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and f"MARK={mark}\0".encode() in Path(f"/proc/{name}/environ").read_bytes() and not zombie(name):
                found.append(int(name))
        except (OSError, ProcessLookupError):
            continue
    return found


def zombie(name: str) -> bool:
    return Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def gone(mark: str) -> bool:
    """Whether all of them end. Those of the tests sleep for much longer than this waits."""
    deadline = time.monotonic() + 60
    while left := marked(mark):
        if time.monotonic() > deadline:
            print("left running:", *(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left))
            return False
        time.sleep(0.05)
    return True
