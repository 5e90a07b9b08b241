"""Runs untrusted pieces of Python, such as those that a model writes, in a sandbox.

Each piece has its own process tree, without network, home or environment. Its only writable folder is an empty one in memory, and
all its processes are ended together. `tasks.sandbox.inside` makes the sandbox. Interpreter and packages are those of the program
that calls it.

If the kernel refuses what the sandbox needs, nothing is run: StageFailed(config) names the missing setting. Needs Linux 5.12.

Not covered: kernel vulnerabilities (that would need a virtual machine), time and memory of the machine below the limits, and code
that looks for the proof of success inside its own interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tasks.sandbox import inside as sandbox_inside
from tuneline.errors import StageFailed

GRACE = 10.0  # seconds for starting and ending, beyond a piece's own limit


@dataclass(frozen=True)
class Limits:
    """Limits one piece. Memory and CPU time are counted per process, the rest for all of its processes together."""

    seconds: float = 30.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    """Address space, including the interpreter's."""
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    processes: int = 16
    """Threads count."""


@dataclass(frozen=True)
class Outcome:
    outcome: Literal["passed", "failed", "timed out", "out of memory", "killed"]
    detail: str
    """The tail of stderr, or the limit that was reached."""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run_python(code: str, limits: Limits | None = None) -> Outcome:
    """Run one piece. It has passed if the last line of `code` was reached."""
    limits = limits or Limits()
    folders = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)} | {sys.prefix, sys.base_prefix}
    request = json.dumps({"code": code, "limits": asdict(limits), "folders": sorted(folders)})
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", sandbox_inside.__file__],  # like -I, except for the variables below
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd="/",
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(request.encode(), limits.seconds + GRACE)
    except subprocess.TimeoutExpired:
        return Outcome("timed out", f"{limits.seconds} seconds")
    finally:
        process.kill()  # the kernel then kills every process in the sandbox
        process.wait()
    answer = json.loads(out) if out else {"outcome": "killed", "detail": errors.decode(errors="replace")[-sandbox_inside.TAIL :]}
    if answer["outcome"] == "refused":
        raise refused(answer["detail"])
    return Outcome(**answer)


def run_all(codes: Sequence[str], limits: Limits | None = None, done: Callable[[int], None] = lambda count: None) -> list[Outcome]:
    """Run one piece per core at a time. Calls `done` with the number of ended pieces."""
    outcomes = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for outcome in pool.map(lambda code: run_python(code, limits), codes):
            outcomes.append(outcome)
            done(len(outcomes))
    return outcomes


def check() -> None:
    """Raises StageFailed(config) if this machine cannot make the sandbox."""
    if sys.platform != "linux":
        raise refused(f"it needs Linux namespaces, found {sys.platform}")
    if not (outcome := run_python("pass")).passed:
        raise refused(f"{outcome.outcome}: {outcome.detail}")


def refused(reason: str) -> StageFailed:
    hint = "allow unprivileged user namespaces"
    for name, wanted in (("kernel/unprivileged_userns_clone", "1"), ("kernel/apparmor_restrict_unprivileged_userns", "0")):
        with contextlib.suppress(OSError):
            if Path("/proc/sys", name).read_text().strip() != wanted:
                hint = f"`sysctl {name.replace('/', '.')}={wanted}`, as root, allows it"
    hint += "; in a container: `--security-opt seccomp=unconfined --security-opt apparmor=unconfined`. Linux 5.12 or newer"
    return StageFailed("config", f"this machine does not let tuneline make the sandbox for code that a model writes ({reason})", hint)
