"""The demo's inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "infra" / "demo"


def test_make_keeps_no_server_from_the_hub() -> None:
    """The server of `make demo` also serves other pipelines."""
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", "--eval", "probe: ; @echo [$$HF_HUB_OFFLINE]", "probe"]
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_bookings_are_what_the_generator_writes(tmp_path: Path) -> None:
    command = [sys.executable, DEMO / "make_bookings.py", "--out", tmp_path / "b.jsonl"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (tmp_path / "b.jsonl").read_bytes() == (DEMO / "bookings.jsonl").read_bytes()


def test_no_guest_or_message_comes_twice() -> None:
    rows = [json.loads(line)["messages"] for line in (DEMO / "bookings.jsonl").read_text().splitlines()]
    names = [name for _, answer in rows if (name := json.loads(answer["content"])["name"]) is not None]
    assert len({prompt["content"] for prompt, _ in rows}) == len(rows) == 1200
    assert len(set(names)) == len(names)
