"""`tuneline setup` without an index, from a folder of wheels."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from flows.commands.setup import build
from tuneline.workspace.runtimes import RuntimeEnvironment


def wheel(folder: Path, name: str, *needs: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
        file.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_only_torch_brings_packages_that_the_lock_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock resolved with a CPU build lacks CUDA's packages; other packages are left out of a lock on purpose."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "torch", "cudalibrary==1.0")
    wheel(wheels, "cudalibrary")
    wheel(wheels, "engine", "torch", "torchvision")
    lock = tmp_path / "mine.txt"
    lock.write_text("torch==1.0\nengine==1.0\n")
    for name, value in {"UV_FIND_LINKS": str(wheels), "UV_NO_INDEX": "1", "UV_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    runtime = RuntimeEnvironment("mine", tmp_path / "mine" / "bin" / "python", lock, tmp_path / "mine")
    build(runtime, lambda message: None)
    assert runtime.ready
    subprocess.run([runtime.python, "-c", "import torch, engine, cudalibrary"], check=True)
