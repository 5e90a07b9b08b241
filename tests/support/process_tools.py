"""Trainings in processes of their own: start, stop or kill at a step, compare. They are forks of the warm parent (warm.py) unless `real`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import warm
from processes import PATIENCE, until
from program_tools import ROOT, program_environment
from warm import Program, descendants

from tuneline.workspace.protocol import Request


def start(request: Request, processes: int = 1, stop_at: int | None = None, real: bool = False) -> Program | subprocess.Popen[bytes]:
    """As the orchestrator does."""
    request.write(request.work / "request.json")
    argv = ["-m", "tasks" if processes == 1 else "tasks.launch", str(request.work / "request.json")]
    with (request.work / "log.txt").open("ab") as log:
        return warm.start(argv, request.work, environment(stop_at), log, log, real)


def environment(stop_at: int | None = None) -> dict[str, str]:
    """Of a program. Modules of tests/support/patches change it: those that PATCHES names, and what stops it at a step."""
    patches = os.environ.get("PATCHES", "").split() + (["stop_at"] if stop_at is not None else [])
    return program_environment() | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(warm.PATCHES)]), "PATCHES": " ".join(patches), "STOP_AT": str(stop_at)
    }  # fmt: skip


def finish(request: Request, processes: int = 1, real: bool = False) -> dict[str, float]:
    assert start(request, processes, real=real).wait(timeout=PATIENCE) == 0, (request.work / "log.txt").read_text()
    metrics: dict[str, float] = json.loads((request.work / "result.json").read_text())["metrics"]
    return metrics


def steps(request: Request) -> list[int]:
    """Steps that were reported, over all attempts. The last line may be half of one."""
    file = request.work / "events.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [event["step"] for event in map(json.loads, lines) if event["type"] == "progress"]


def start_until(request: Request, step: int, processes: int = 1, real: bool = False) -> tuple[Program | subprocess.Popen[bytes], list[int]]:
    """Starts it and waits until it has reported the step and stopped itself; returns it and the processes of its ranks, or its own.

    The first of them is the one that stopped: SIGCONT lets it go on.
    """
    process = start(request, processes, step, real)

    def stopped() -> list[int]:
        assert process.poll() is None, (request.work / "log.txt").read_text()
        return [pid for pid in (process.pid, *descendants(process.pid)) if state(pid) == "T"]

    (first,) = until(stopped)
    assert steps(request)[-1] == step
    ranks = [process.pid] if processes == 1 else descendants(process.pid)
    assert first == ranks[0]
    return process, ranks


def state(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # also one that ends between the opening and the reading
        return ""


def kill_at(request: Request, step: int, processes: int = 1) -> None:
    """Kills it and all its processes with -9 once it has reported the step."""
    process, _ = start_until(request, step, processes)
    warm.kill([process.pid, *descendants(process.pid)])
    process.wait()
    assert not (request.work / "result.json").exists()


def losses(request: Request, name: str = "loss") -> dict[int, float]:
    """By step, of the history that the training hands over."""
    entries = [json.loads(line) for line in (request.meta / "history.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[name] for entry in entries if name in entry}
