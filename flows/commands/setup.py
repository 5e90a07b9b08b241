"""`tuneline setup`: builds runtimes from their locks with uv, byte-compiled (importing trl uncompiled costs 18 s more each time).

A lock is complete, so nothing is resolved: `--no-deps` leaves out what a lock leaves out, as vLLM's does (see LEFT_OUT in the Makefile).
Only torch is asked for its needs: a lock resolved with a CPU build lacks the CUDA packages of the build that uv takes on a machine with a
GPU, and torch does not import without them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from uv import find_uv_bin

from tuneline.errors import StageFailed
from tuneline.workspace.runtimes import MARKER, RuntimeEnvironment


def build(runtime: RuntimeEnvironment, say: Callable[[str], None]) -> None:
    """Makes the runtime's folder, marker last. One builder at a time; whoever waited finds it done."""
    if runtime.ready or runtime.folder is None:
        return
    folder, started = runtime.folder, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if runtime.ready:
            return
        say(f"runtime {runtime.name}: installing {runtime.lock} (several minutes the first time, with the download)")
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--quiet", "--python", sys.executable, str(folder))
        _uv("pip", "install", "--no-deps", "--compile-bytecode", "--python", str(runtime.python), "-r", str(runtime.lock))
        if (torch := runtime.versions(["torch"])["torch"]) != "absent":
            _uv("pip", "install", "--compile-bytecode", "--python", str(runtime.python), f"torch=={torch}")
        (folder / MARKER).write_text("")
        say(f"runtime {runtime.name}: ready after {time.monotonic() - started:.0f} s")


def _uv(*arguments: str) -> None:
    """uv does not read pip's settings: hands find-links on, else picks the torch wheels that fit the machine (CPU or CUDA)."""
    environment = dict(os.environ)
    links = environment.get("PIP_FIND_LINKS")
    if links:
        environment.setdefault("UV_FIND_LINKS", links.replace(" ", ","))
    elif not environment.get("UV_FIND_LINKS"):
        environment.setdefault("UV_TORCH_BACKEND", "auto")
    done = subprocess.run([find_uv_bin(), *arguments], env=environment, stdout=sys.stderr)
    if done.returncode:
        command = " ".join(["uv", *arguments])
        raise StageFailed(
            "config", f"`{command}` ended with status {done.returncode}", "see its messages above; the next `tuneline setup` starts from scratch"
        )
