"""`tuneline setup`: build runtimes from their locks with uv, byte-compiled (otherwise each import of trl takes 18 s longer).

A lock is complete, so nothing is resolved: `--no-deps` respects what a lock omits, as vLLM's does (see LEFT_OUT in the Makefile).
Only torch's dependencies are resolved: a lock made with a CPU build lacks the CUDA packages of the build that uv installs on a machine
with a GPU, and torch does not import without them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from uv import find_uv_bin

from tuneline.errors import StageFailed
from tuneline.files import hold_lock
from tuneline.workspace.runtimes import MARKER, RuntimeEnvironment


def build(runtime: RuntimeEnvironment, say: Callable[[str], None]) -> None:
    """Build the runtime's folder and write the marker last. Holds a lock; a process that waited for it finds the runtime ready."""
    if runtime.ready or runtime.folder is None:
        return
    folder, started = runtime.folder, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.parent / f".{folder.name}.lock"):
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
    """Run uv. Passes pip's find-links on, which uv does not read; without, has uv choose torch wheels for the machine (CPU or CUDA)."""
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
            "config",
            f"`{command}` ended with status {done.returncode}",
            "see its messages above; the next `tuneline setup` starts from scratch",
        )
