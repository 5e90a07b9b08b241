"""A user's project folder, with `tuneline` called on it, and a stand-in for its programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


def python_of(name: str) -> Path:
    """Python of a built-in runtime, which `make test` has built."""
    from tuneline.config.load import load
    from tuneline.workspace.runtimes import find_runtime

    runtime = find_runtime(name, load(ROOT / "pipelines.yaml").spec, ROOT)
    assert runtime.ready, f"the runtime `{name}` is not set up: run `tuneline setup {name}`"
    return runtime.python


class Project:
    """A folder with a pipelines.yaml, and `tuneline` on it as a user calls it."""

    def __init__(self, root: Path):
        self.root = root

    def write(self, text: str, name: str = "pipelines.yaml") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    warm = os.environ.get("WARM") != "0"
    """Whether commands are forks of one process that has imported everything. Not so in tests that are marked `process`."""

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts the command line. With settings that Python reads when it starts, in a process of its own."""
        kind: type[subprocess.Popen[str]] = subprocess.Popen
        if self.warm and not environment.keys() & {"PYTHONPATH", "PYTHONHASHSEED"}:
            from warm_tuneline import Warm as kind
        command = [sys.executable, "-m", "tuneline", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return kind(command, cwd=self.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def tuneline(self, *arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, f"status {process.returncode} instead of {status}\n{out}\n{err}"
        return subprocess.CompletedProcess(arguments, status, out, err)

    def json(self, *arguments: str, status: int = 0, **environment: str) -> Any:
        return json.loads(self.tuneline(*arguments, "--json", status=status, **environment).stdout)


def place_stand_in(project: Project) -> Callable[..., None]:
    run = f'exec {sys.executable} -I -S {ROOT}/tests/support/stand_in.py "$3"'
    shell = f"""#!/bin/sh\nif [ "$1" = -I ]; then echo '{{"pydantic": "2.12.0"}}'; else {run}; fi\n"""  # -I: asked for its versions
    python = project.write(shell, "bin/python")
    python.chmod(0o755)

    def script(**actions: list[Any]) -> None:
        project.write(json.dumps(actions), "script.json")

    script()
    return script


def shadow(folder: Path, *names: str) -> None:
    """Puts packages of these names into a folder. Importing one ends the process."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('raise SystemExit(f"imported {__file__}")')
