"""The benchmarks run in the programs' runtime, which has nothing that tests alone need; what they measure is in docs/benchmarks.md."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from program_tools import ROOT


@pytest.mark.parametrize("name", ["program_tools", "pico"])
def test_what_the_tests_and_the_benchmarks_share_needs_only_the_runtime(name: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if "argparse" in path.read_text(encoding="utf-8")]
)
def test_a_benchmark_says_what_it_takes(name: str) -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--help"],
        env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "usage:" in found.stdout
