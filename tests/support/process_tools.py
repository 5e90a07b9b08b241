"""Trainings in processes of their own: start, kill at a step, compare."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from program_tools import ROOT

from tuneline.protocol import Request

FSDP_ON_CPUS = ROOT / "tests" / "support" / "fsdp_on_cpus"  # as PATCHES


def start(request: Request, processes: int = 1) -> subprocess.Popen[bytes]:
    """As the orchestrator does; modules in PATCHES are found, too."""
    request.write(request.work / "request.json")
    command = [sys.executable, "-m", "tasks" if processes == 1 else "tasks.launch", str(request.work / "request.json")]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PATCHES")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    with (request.work / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=request.work, env=env, stdout=log, stderr=log)


def finish(request: Request, processes: int = 1) -> dict[str, float]:
    assert start(request, processes).wait(timeout=300) == 0, (request.work / "log.txt").read_text()
    metrics: dict[str, float] = json.loads((request.work / "result.json").read_text())["metrics"]
    return metrics


def steps(request: Request) -> list[int]:
    """Steps that were reported, over all attempts. The last line may be half of one."""
    file = request.work / "events.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [event["step"] for event in map(json.loads, lines) if event["type"] == "progress"]


def kill_at(request: Request, step: int, processes: int = 1) -> None:
    """Kills it and all its processes with -9 once it has reached the step."""
    before = len(steps(request))
    process = start(request, processes)
    deadline = time.monotonic() + 200
    while max(steps(request)[before:], default=0) < step:
        assert process.poll() is None, (request.work / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in filter(str.isdigit, os.listdir("/proc")):  # each of its processes is in a group of its own
        with contextlib.suppress(OSError):
            if str(request.work / "request.json").encode() in Path("/proc", pid, "cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
    process.wait()
    assert not (request.work / "result.json").exists()


def losses(request: Request, name: str = "loss") -> dict[int, float]:
    """By step, of the history that the training hands over."""
    entries = [json.loads(line) for line in (request.meta / "history.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[name] for entry in entries if name in entry}
