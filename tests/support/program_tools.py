"""What the tests of the programs and the benchmarks share: a request, a run of it in this process or another, the digest of what it wrote.

Plain Python beside the programs: the benchmarks run in runtimes, which have no pytest.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import warm
from processes import PATIENCE

from tasks.models.loading import CPU_INFO, CPUS_WITH_BFLOAT16
from tuneline.config.spec import PROGRAM_STAGES
from tuneline.files import sha256
from tuneline.workspace.artifact import File, digest
from tuneline.workspace.protocol import Events, Input, Request, Result

ROOT = Path(__file__).resolve().parents[2]


def make_request(folder: Path, config: dict[str, Any], inputs: dict[str, Input], **fields: Any) -> Request:
    """A request for the stage `config`, with its folders below `folder`."""
    stage = PROGRAM_STAGES[config["kind"]].model_validate(config)
    document = stage.model_dump(mode="json") | stage.decided()
    out, work = folder / "out", folder / "work"
    for path in (out / "payload", out / "meta", work):
        path.mkdir(parents=True)
    return Request(
        **{
            "kind": stage.kind, "key": "0" * 64, "config": document, "seed": document["seed"], "inputs": inputs, "files": {}, "commits": {},
            "out": out, "work": work, "attempt": 1, "resources": document["resources"], **fields,
        }
    )  # fmt: skip


def run_program(request: Request) -> tuple[Result, list[dict[str, Any]]]:
    """Runs it in this process; returns the result and the events."""
    file = request.work / "events.jsonl"
    program = importlib.import_module(PROGRAM_STAGES[request.kind].program)
    result = program.run(request, request.stage(), Events(file))
    return result, [json.loads(line) for line in file.read_text(encoding="utf-8").strip().split("\n")]


def emulates_bfloat16() -> bool:
    """Whether stages in bfloat16 are refused on this machine's CPU."""
    return not set(CPU_INFO.read_text().split()) & CPUS_WITH_BFLOAT16


class Killed(Events):
    """Events that end the program at a step, as a kill would: before the step's checkpoint is written."""

    step = 0

    def progress(self, step: int, total: int, message: str | None = None) -> None:
        if step == self.step:
            raise KeyboardInterrupt
        super().progress(step, total, message)


def run_until(request: Request, step: int) -> None:
    events = Killed(request.work / "events.jsonl")
    events.step = step
    try:
        importlib.import_module(PROGRAM_STAGES[request.kind].program).run(request, request.stage(), events)
    except KeyboardInterrupt:
        return
    raise AssertionError(f"the program ended before step {step}")


def program_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


def run_process(request: Request) -> subprocess.CompletedProcess[str]:
    """Runs it as the orchestrator does, in a process of its own: a fork of the warm parent (warm.py)."""
    request.write(request.work / "request.json")
    argv = ["-m", "tasks", str(request.work / "request.json")]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        status = warm.start(argv, request.work, program_environment(), out, error).wait(timeout=PATIENCE)
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(argv, status, out.read(), error.read())


def payload_digest(request: Request) -> str:
    """The store's."""
    files = [path for path in request.payload.rglob("*") if path.is_file()]
    entries = (File(path=path.relative_to(request.payload).as_posix(), size=path.stat().st_size, sha256=sha256(path)) for path in files)
    return digest(tuple(entries))
