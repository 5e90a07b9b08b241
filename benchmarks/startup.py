"""Measure the imports of each kind's program: seconds by package, and the CPU seconds that hiding packages saves.

    PYTHONPATH=. <python of the torch runtime> benchmarks/startup.py --quantize PYTHON [--rounds 3]      (make bench-startup)

Each program runs whole, on a pico model, under `python -X importtime`, so what it imports late counts too. Seconds are the modules'
own, added up by package (importtime itself makes them about a tenth longer); the median of the rounds by kind counts. The table names
the packages that cost most, and who imported each first. Ours are `tasks` and `tuneline`: the rest is the libraries' own, and cannot
be shorter unless a library is not needed. Files are read from the page cache, from compiled bytecode.

Each also runs twice more without importtime: as it is, and with `tasks.packages` left out, when libraries import whatever is installed
while the garbage collector works. The median CPU seconds of the two stand side by side; what they write must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from table import add_row  # noqa: E402

from tuneline.workspace.protocol import Input, Request, Result  # noqa: E402

OURS = ("tasks", "tuneline")
SHOWN = 6  # packages named in a row
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| ( *)(\S+)$")
SFT = {"max_steps": 4, "global_batch_size": 4, "learning_rate": 5e-3}
QUANTIZE = {"group_size": 32, "samples": 8, "max_perplexity_ratio": 3}
PICO: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {  # kind: (fields, inputs by slot, type)
    "model": ({}, {}, "Model"),
    "dataset": ({"model": "base", "split": {"validation": 0.1, "test": 0.2}}, {"model": "model"}, "Dataset"),
    "sft": ({"model": "base", "dataset": "words", **SFT}, {"model": "model", "dataset": "dataset"}, "Adapter"),
    "merge": ({"adapters": ["sft"]}, {"adapters.0": "sft"}, "Model"),
    "evaluate": ({"model": "sft", "datasets": ["words"], "max_new_tokens": 4}, {"model": "sft", "datasets.0": "dataset"}, "Report"),
    "quantize": ({"model": "m", "calibration": "words", **QUANTIZE}, {"model": "merge", "calibration": "dataset"}, "Model"),
}


AS_IT_IS = ["-m", "tasks"]
ALL_IMPORTED = """\
import importlib, sys
from tasks import __main__ as program
program.hide, program.import_program = lambda request: None, lambda stage: importlib.import_module(stage.program)
sys.exit(program.main())
"""


def request_for(folder: Path, kind: str, artifacts: dict[str, Input]) -> Request:
    """Write a request into a new folder."""
    from program_tools import make_request

    config, slots, _ = PICO[kind]
    files: dict[str, list[Path]] = {}
    config = {"kind": kind, **config}
    if kind == "model":
        config["path"], files["path"] = str(folder / "pico"), [folder / "pico"]
    if kind == "dataset":
        config["sources"], files["sources.0.path"] = [{"type": "files", "path": "words.jsonl"}], [folder / "words.jsonl"]
    request = make_request(
        folder / str(len(os.listdir(folder))), config, {slot: artifacts[name] for slot, name in slots.items()}, files=files
    )
    request.write(request.work / "request.json")
    return request


def artifact_of(request: Request, artifacts: dict[str, Input]) -> Input:
    template = Result.read(request.work / "result.json").info.get("template")
    output_type = PICO[request.kind][2]
    base = artifacts["model"] if output_type == "Adapter" else None
    return Input(path=request.payload, digest="", type=output_type, template=template, base=base)  # type: ignore[arg-type]


def seconds_of(python: str, request: Request, how: list[str]) -> tuple[float, str]:
    """Return (CPU seconds, stderr) of a program that `python` starts as `how`."""
    before = cpu()
    said = run([python, *how, str(request.work / "request.json")], request.work)
    return cpu() - before, said


def by_package(output: str) -> tuple[Counter[str], dict[str, str]]:
    """Parse the output of importtime, which prints a module after those that it imported, indented by two more spaces."""
    lines = [match for line in output.splitlines() if (match := LINE.match(line))]
    seconds: Counter[str] = Counter()
    importer: dict[str, str] = {}
    for number, line in enumerate(lines):
        package = line[3].split(".")[0]
        seconds[package] += int(line[1]) / 1e6  # type: ignore[assignment]
        if package not in importer:
            importer[package] = next((name for name in outer(lines, number) if name.split(".")[0] != package), "-")
    return seconds, importer


def outer(lines: list[re.Match[str]], number: int) -> Iterator[str]:
    """Return the modules whose import includes line `number`, innermost first."""
    depth = len(lines[number][2])
    for line in lines[number + 1 :]:
        if len(line[2]) < depth:
            depth = len(line[2])
            yield line[3]


def run(command: list[str], folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}")
    return done.stderr


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    from program_tools import payload_digest

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", required=True, help="python of the runtime `quantize`")
    parser.add_argument("--rows", type=Path, help="file that the rows of the common table are appended to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run([sys.executable, str(ROOT / "tests" / "support" / "pico.py"), str(folder / "pico")], folder)
        rows = [{"prompt": f"Say the word number {i}.", "completion": f"word{i % 7}"} for i in range(60)]
        (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        artifacts: dict[str, Input] = {}
        print(f"median of {arguments.rounds}\n{'kind':<10}{'CPU s':>7}{'all':>7}{'imports':>9}{'ours':>7}   most, and who imports it first")
        for kind in PICO:
            python = arguments.quantize if kind == "quantize" else sys.executable
            imports, spent = [], []
            for _ in range(arguments.rounds):
                traced, plain, whole = (request_for(folder, kind, artifacts) for _ in range(3))
                imports.append(by_package(seconds_of(python, traced, ["-X", "importtime", *AS_IT_IS])[1]))
                spent.append((seconds_of(python, plain, AS_IT_IS)[0], seconds_of(python, whole, ["-c", ALL_IMPORTED])[0]))
                assert payload_digest(plain) == payload_digest(whole), kind
            artifacts[kind] = artifact_of(plain, artifacts)
            seconds, importer = sorted(imports, key=lambda figures: figures[0].total())[len(imports) // 2]
            total, own = seconds.total(), sum(seconds[package] for package in OURS)
            ours, all_imported = (statistics.median(pair) for pair in zip(*spent, strict=True))
            most = ", ".join(f"{package} {s:.2f} ({importer[package]})" for package, s in seconds.most_common(SHOWN))
            print(f"{kind:<10}{ours:>7.1f}{all_imported:>7.1f}{total:>9.2f}{own:>7.2f}   {most}", flush=True)
            add_row(arguments.rows, f"start of {kind}: our own modules", own, "all that it imports", total, "s", 0.05)
            add_row(arguments.rows, f"{kind} of a pico model: CPU", ours, "importing all that is there", all_imported, "s", 1)


if __name__ == "__main__":
    main()
