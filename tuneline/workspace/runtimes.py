"""Runtimes: the Python environments that programs run in, and the versions of their libraries.

A runtime is a lock file, installed by `tuneline setup` into `.tuneline/runtimes/<name>-<digest of the lock>/` (or the folder
that TUNELINE_RUNTIMES names: an image contains its own, for every project), or an existing Python. Versions are read
from the lock, so that a key can be computed before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tuneline.config.spec import Spec
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.paths import PACKAGES_ROOT, resolve_path

BUILT_IN_LOCKS = PACKAGES_ROOT / "infra" / "runtimes"
MARKER = "tuneline-complete"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*(?:(==)\s*([^\s;,]+))?")


@dataclass(frozen=True)
class RuntimeEnvironment:
    """A runtime. `lock` and `folder` are None for an existing Python of the user."""

    name: str
    python: Path
    lock: Path | None = None
    folder: Path | None = None

    @property
    def ready(self) -> bool:
        return self.python.exists() if self.folder is None else (self.folder / MARKER).exists()

    def versions(self, libraries: Iterable[str]) -> dict[str, str]:
        """Return the version of each library, without local suffix; `absent` for a missing library."""
        pins = _locked(self.lock) if self.lock else _installed(self.python)
        return {name: pins.get(name, "absent").partition("+")[0] for name in libraries}


def find_runtime(name: str, spec: Spec, root: Path) -> RuntimeEnvironment:
    """Find a runtime by name. `root`: the folder of pipelines.yaml. Raises ConfigError if its lock or Python does not exist."""
    declared = spec.runtimes.get(name)
    if declared and declared.python:
        python = resolve_path(root, declared.python)
        if not python.exists():
            raise ConfigError([Problem(name, f"found no Python at {python}", "name the `bin/python` of the environment", place="runtimes")])
        return RuntimeEnvironment(name, python)
    lock = resolve_path(root, declared.lock) if declared and declared.lock else BUILT_IN_LOCKS / f"{name}.txt"
    if not lock.is_file():
        raise ConfigError([Problem(name, f"found no lock file at {lock}", "create one with `uv pip compile`", place="runtimes")])
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("TUNELINE_RUNTIMES") or root / ".tuneline" / "runtimes") / f"{name}-{digest}"
    return RuntimeEnvironment(name, folder / "bin" / "python", lock, folder)


def ready_runtime(name: str, spec: Spec, root: Path) -> RuntimeEnvironment:
    """Find a runtime that is set up. Raises StageFailed(config) if it is not."""
    runtime = find_runtime(name, spec, root)
    if not runtime.ready:
        raise StageFailed("config", f"the runtime {name} is not set up", f"`tuneline setup {name}` builds it")
    return runtime


def _locked(lock: Path) -> dict[str, str]:
    pins: dict[str, str] = {}
    for number, line in enumerate(lock.read_text(encoding="utf-8").splitlines(), 1):
        pin = _PIN.match(line)
        if pin and not pin[2]:
            found = f"found `{line.strip()}` in a lock, expected name==version"
            raise ConfigError(
                [Problem("", found, "create the lock with `uv pip compile`, which pins every package", place=f"{lock}:{number}")]
            )
        if pin and _applies(line):
            pins[_normal(pin[1])] = pin[3]
    return pins


def _applies(line: str) -> bool:
    """Return whether a line of a lock applies to this machine; `uv pip compile --universal` writes lines with markers."""
    marker = line.partition(" #")[0].partition(";")[2].rstrip(" \\")
    if not marker.strip():
        return True
    from packaging.markers import Marker

    return Marker(marker).evaluate()


@lru_cache
def _installed(python: Path) -> dict[str, str]:
    program = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    try:
        found = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True)
        return {_normal(name): version for name, version in json.loads(found.stdout).items()}
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        hint = "name the `bin/python` of the environment"
        raise ConfigError([Problem("", f"found {python}, which does not run as Python ({error})", hint, place="runtimes")]) from None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
