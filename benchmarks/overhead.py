"""Measure tuneline's overhead per stage: a chain of trivial stages by `tuneline run`, compared with the programs called in sequence.

    .venv/bin/python benchmarks/overhead.py [--stages 20] [--rounds 3]                                    (make bench-overhead)

The program is the tests' stand-in (tests/support/stand_in.py): it reads its request, writes one small file and ends, so nearly all of its
time is Python's start. Plain: the same command with the same requests, without a flow, watchdog, store or Prefect. Ours is the real
command line with timers around its parts. Per stage is the time from the first stage's start to the last one's end by their number;
Prefect is what of it no other part took. The Prefect server runs already, but for the start-ups that say otherwise. The rounds go by
turns and the best counts, since other work on the machine only ever adds. What a real program imports (seconds for torch and
transformers) comes on top of both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from table import add_row  # noqa: E402

from flows.server.connect import embedded_server  # noqa: E402
from tuneline.config.load import load  # noqa: E402
from tuneline.config.spec import ProgramStage  # noqa: E402
from tuneline.files import sha256  # noqa: E402
from tuneline.workspace.protocol import Request  # noqa: E402

PARTS = {
    "program, its start and end watched": "program",
    "key: config, files, versions": "key",
    "publish: hash, sync to disk, rename": "publish",
    "locks, requests, run record": "rest",
    "Prefect": "prefect",
}
TIMED = """
import atexit, json, os, sys, threading, time
import flows.__main__, flows.run.stage
from flows.run.supervisor import Supervisor
from flows.run.run_context import Run
from tuneline.workspace.store import Store

seconds, spans, lock = {}, [], threading.Lock()

def timed(owner, name, part):
    real = getattr(owner, name)
    def wrapper(*arguments, **named):
        start = time.time()
        try:
            return real(*arguments, **named)
        finally:
            with lock:
                seconds[part] = seconds.get(part, 0.0) + time.time() - start
                spans.append((start, time.time()))
    setattr(owner, name, wrapper)

timed(flows.run.stage, "_carry_out", "stage")
timed(Run, "resolve", "key")
timed(flows.run.stage, "document_of", "key")
timed(Supervisor, "run", "program")
timed(Store, "publish", "publish")

def tell():
    seconds["whole"] = max(end for _, end in spans) - min(start for start, _ in spans)
    with open("timed.json", "w") as file:
        json.dump(seconds, file)

atexit.register(tell)
sys.argv = ["tuneline", "run", "chain"]
flows.__main__.main()
"""


def chain(folder: Path, stages: int) -> None:
    """Write a project with a chain of stages."""
    lines = ["version: 1", "runtimes: {stand-in: {python: bin/python}}", "pipelines:", "  chain:", "    stages:"]
    for i in range(stages):
        needs = f", needs: [s{i - 1}]" if i else ""
        lines.append(f"      s{i}: {{kind: dataset, runtime: stand-in, seed: {i}, sources: [{{type: files, path: rows.txt}}]{needs}}}")
    (folder / "bin").mkdir(parents=True)
    (folder / "pipelines.yaml").write_text("\n".join(lines) + "\n")
    (folder / "rows.txt").write_text("rows")
    (folder / "script.json").write_text("{}")
    python = folder / "bin" / "python"
    shell = f'if [ "$1" = -I ]; then exec {sys.executable} "$@"; fi\nexec {sys.executable} {ROOT}/tests/support/stand_in.py "$3"\n'
    python.write_text(f"#!/bin/sh\n{shell}")
    python.chmod(0o755)


def plain(folder: Path) -> float:
    """Return the seconds per stage of the programs alone."""
    requests = []
    for name, stage in load(folder / "pipelines.yaml").pipeline("chain").stages.items():
        assert isinstance(stage, ProgramStage)
        work = folder / ".tuneline" / "plain" / name
        work.mkdir(parents=True)
        request = Request(
            kind=stage.kind, key="0" * 64, config=stage.model_dump(mode="json"), seed=stage.seed, inputs={},
            files={"sources.0.path": [folder / "rows.txt"]}, commits={}, out=work / "out", work=work, attempt=1,
            resources=stage.resources.model_dump(mode="json"),
        )  # fmt: skip
        request.write(work / "request.json")
        requests.append(work / "request.json")
    start = time.perf_counter()
    for path in requests:
        subprocess.run([folder / "bin" / "python", "-m", "tasks", path], check=True, cwd=path.parent, capture_output=True)
    return (time.perf_counter() - start) / len(requests)


def ours(folder: Path, stages: int) -> dict[str, float]:
    """Return the seconds per stage of each part."""
    run([sys.executable, "-c", TIMED], folder)
    seconds = {part: total / stages for part, total in json.loads((folder / "timed.json").read_text()).items()}
    seconds["prefect"] = seconds["whole"] - seconds["stage"]
    seconds["rest"] = seconds["stage"] - seconds["key"] - seconds["program"] - seconds["publish"]
    return seconds


def start_up(folder: Path, **environment: str) -> float:
    """Return the seconds from the command to the start of its first program."""
    shutil.rmtree(folder / ".tuneline" / "store", ignore_errors=True)
    calls = folder / "calls-rows"
    calls.unlink(missing_ok=True)
    start = time.time()
    run([sys.executable, "-m", "flows", "run", "chain"], folder, **environment)
    return calls.stat().st_mtime - start


def run(command: list[str], folder: Path, **environment: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")


def hashing(folder: Path, megabytes: int = 256) -> float:
    """Return the megabytes per second of reading and hashing a file in the page cache."""
    file = folder / "large"
    file.write_bytes(os.urandom(1_000_000) * megabytes)
    start = time.perf_counter()
    sha256(file)
    return megabytes / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="file that the rows of the common table are appended to")
    arguments = parser.parse_args()
    best_plain, best, starts = float("inf"), {"whole": float("inf")}, dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        chain(Path(name, "one"), 1)
        for kind in ("its own Prefect server, a new project", "its own Prefect server"):
            starts[kind] = start_up(Path(name, "one"), PREFECT_API_URL="")
        with embedded_server(Path(name, "prefect")):
            for number in range(arguments.rounds):
                for way in ("plain", "ours"):
                    chain(Path(name, f"{way}-{number}"), arguments.stages)
                best_plain = min(best_plain, plain(Path(name, f"plain-{number}")))
                best = min(best, ours(Path(name, f"ours-{number}"), arguments.stages), key=lambda seconds: seconds["whole"])
                running = start_up(Path(name, "one"))
                starts["a Prefect server that runs"] = min(running, starts.get("a Prefect server that runs", running))
        speed = hashing(Path(name))
    print(f"\nA chain of {arguments.stages} trivial stages, best of {arguments.rounds}\n{'per stage':<44}{'ms':>8}{'of plain':>10}")
    rows = {"plain program": best_plain, "tuneline run": best["whole"]}
    rows |= {f"  {title}": best[part] for title, part in PARTS.items()}
    for title, seconds in rows.items():
        print(f"{title:<44}{1000 * seconds:>8.0f}{seconds / best_plain:>10.2f}")
    print(f"\n{'start-up, until the first program runs, with':<44}{'s':>8}")
    for title, seconds in starts.items():
        print(f"{title:<44}{seconds:>8.1f}")
    print(f"\nhashing of files: {speed:.0f} MB/s")
    add_row(arguments.rows, "what tuneline adds to a stage", best["whole"] - best_plain, "limit", 0.5, "s", 1.0)


if __name__ == "__main__":
    main()
