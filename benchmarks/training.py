"""Compare the sft stage with a plain TRL script and LLaMA-Factory: seconds per step, tokens/s, peak memory, start-up; same model and rows.

    PYTHONPATH=. <python of the torch runtime> benchmarks/training.py --peer .cache/bench-llamafactory/bin/python     (make bench-training)

The model is the demo's SmolLM2-135M-Instruct in float32, with LoRA of rank 16 on all linear layers. 64 made-up conversations, all of
40 tokens, and 64 of 24 to 120 (as many short as long ones on a logarithmic scale), are trained on in 8 steps of 8 rows, in two
micro-batches of 4; answers count in the loss. The seeds agree, so that all three draw the same rows for a step. Each training is a
process of its own, ours the stage's program, by turns. A step's time is the median of a run's steps but its first two, and the rounds'
medians count. Start-up is what passes before the first step: imports, loading, tokenizing, and our checks. Tokens are the rows' own,
without padding.
LLaMA-Factory cannot share an environment with the runtime (it wants older versions of everything), hence --peer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from table import add_row  # noqa: E402

from tuneline.workspace.protocol import Input  # noqa: E402

GGUF = ROOT / "infra" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MICRO, ACCUMULATED, STEPS, LEFT_OUT = 4, 2, 8, 2  # as in training_trl.py
BATCH = MICRO * ACCUMULATED
LENGTHS = {
    "rows of one length": [40] * BATCH * STEPS,
    "rows of 24 to 120 tokens": [round(24 * 5 ** (i / (BATCH * STEPS - 1))) for i in range(BATCH * STEPS)],
}
GOALS = {  # highest ratios of our time to a peer's
    "rows of one length": {"TRL": 0.8, "LLaMA-Factory": 1.0},
    "rows of 24 to 120 tokens": {"TRL": 0.62, "LLaMA-Factory": 0.7},
}
WORDS = "red blue green house tree river stone cloud light water paper glass metal winter summer".split()
WAYS = ("ours", "TRL", "LLaMA-Factory")
OUR_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # as in flows/run/supervisor.py; the others have their defaults


@dataclass
class Run:
    start: float  # seconds before the first step
    step: float  # seconds, median
    cpu: float  # seconds of the CPUs in a step, median: what others do on the machine counts less
    whole: float  # seconds of the process
    memory: float  # peak megabytes


def prepare(folder: Path) -> None:
    """Write `model/`, and for each set of rows a Dataset of ours, a file for TRL, and one for LLaMA-Factory with its configuration."""
    from program_tools import make_request, run_program

    from tasks.data.masks import tokenize
    from tasks.data.rows import SPLITS, Row, write_rows
    from tasks.models.loading import load_tokenizer

    request = make_request(folder / "model", {"kind": "model", "gguf": str(GGUF)}, {}, files={"gguf": [GGUF]})
    run_program(request)
    tokenizer = load_tokenizer(Input(path=request.payload, digest="", type="Model"))
    for number, lengths in enumerate(LENGTHS.values()):
        rows = conversations(lengths, random.Random(0))
        made = [Row("made up", messages=tuple(row), id=str(i), group=str(i)) for i, row in enumerate(rows)]
        if (found := sorted(len(tokenize(row, tokenizer).input_ids) for row in made)) != lengths:
            sys.exit(f"rows of {lengths} tokens were wanted, these have {found}")
        (folder / f"rows{number}").mkdir()
        for split in SPLITS:
            write_rows(made if split == "train" else [], folder / f"rows{number}" / f"{split}.parquet")
        write_lines(folder / f"trl{number}.jsonl", [{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
        write_lines(folder / f"factory{number}.jsonl", [{"messages": row} for row in rows])
        factory = factory_arguments(request.payload, folder, number)
        (folder / f"factory{number}.yaml").write_text(json.dumps(factory))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    files = {f"rows{i}": {"file_name": f"factory{i}.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
             for i in range(len(LENGTHS))}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(files))


def conversations(lengths: list[int], generator: random.Random) -> list[list[dict[str, str]]]:
    """Return a conversation of that many tokens: each word is one, SmolLM2's template adds 19. Half is the answer."""
    rows = []
    for length in lengths:
        words = [generator.choice(WORDS) for _ in range(length - 19)]
        half = len(words) // 2
        texts = {"system": "Go on.", "user": " ".join(words[:half]), "assistant": " ".join(words[half:])}
        rows.append([{"role": role, "content": text} for role, text in texts.items()])
    generator.shuffle(rows)
    return rows


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def factory_arguments(model: Path, folder: Path, number: int) -> dict[str, Any]:
    """Return LLaMA-Factory's configuration. Its template `smollm` equals SmolLM2's own; it pads to multiples of 8."""
    return {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "lora_rank": 16, "lora_alpha": 32,
        "model_name_or_path": str(model), "infer_dtype": "float32", "use_cpu": True, "disable_gradient_checkpointing": True,
        "dataset_dir": str(folder), "dataset": f"rows{number}", "template": "smollm", "cutoff_len": 1024,
        "output_dir": str(folder / "factory"), "report_to": "none", "logging_steps": 1,
        "per_device_train_batch_size": MICRO, "gradient_accumulation_steps": ACCUMULATED, "max_steps": STEPS,
        "learning_rate": 2e-4, "lr_scheduler_type": "linear", "seed": 0, "data_seed": 0,
    }  # fmt: skip


def measured(way: str, folder: Path, number: int, peer: Path, attempt: int) -> Run:
    from program_tools import make_request

    model, printed = folder / "model" / "out" / "payload", ("output.txt", "{'loss':")
    if way == "TRL":
        script = str(ROOT / "benchmarks" / "training_trl.py")
        return run([sys.executable, script, str(model), f"trl{number}.jsonl", "trl"], folder, *printed, {})
    if way == "LLaMA-Factory":
        shutil.rmtree(folder / "factory", ignore_errors=True)  # it would resume
        return run([str(peer), "-m", "llamafactory.cli", "train", f"factory{number}.yaml"], folder, *printed, {})
    config = {
        "kind": "sft", "model": "base", "dataset": "rows", "lora": {"r": 16, "lora_alpha": 32}, "dtype": "float32", "max_steps": STEPS,
        "learning_rate": 2e-4, "global_batch_size": BATCH, "resources": {"micro_batch_size": MICRO},
    }  # fmt: skip
    inputs = {
        "model": Input(path=model, digest="", type="Model"),
        "dataset": Input(path=folder / f"rows{number}", digest="", type="Dataset"),
    }
    request = make_request(folder / f"ours{number}-{attempt}", config, inputs)
    request.write(request.work / "request.json")
    return run([sys.executable, "-m", "tasks", "request.json"], request.work, "events.jsonl", '"type": "progress"', OUR_THREADS)


def run(command: list[str], folder: Path, steps: str, mark: str, settings: dict[str, str]) -> Run:
    """Measure a training. A step ends when another `mark` is in the file `steps`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **settings}
    ends, begun, ended = [(0.0, 0.0)], time.perf_counter(), 0
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    while not ended:
        time.sleep(0.01)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if (folder / steps).exists() and (folder / steps).read_text(errors="replace").count(mark) >= len(ends):
            ends.append((time.perf_counter() - begun, cpu_seconds(process.pid)))
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(ends) != STEPS + 1:
        text = (folder / "output.txt").read_text(errors="replace")[-4000:]
        sys.exit(f"{' '.join(command)} ended with {process.returncode}, {len(ends) - 1} steps were seen\n{text}")
    step, cpu = (
        statistics.median(end[i] - before[i] for before, end in zip(ends[LEFT_OUT:], ends[LEFT_OUT + 1 :], strict=False)) for i in (0, 1)
    )
    return Run(ends[1][0] - step, step, cpu, time.perf_counter() - begun, usage.ru_maxrss / 1e3)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path, required=True, help="Python of an environment with LLaMA-Factory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="file that the rows of the common table are appended to")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--peer", arguments.peer, "--prepare", name], check=True, stdout=subprocess.DEVNULL)
        for number, (rows, lengths) in enumerate(LENGTHS.items()):
            runs: dict[str, list[Run]] = {way: [] for way in WAYS}
            for attempt in range(arguments.rounds):
                for way in WAYS:
                    runs[way].append(measured(way, folder, number, arguments.peer.absolute(), attempt))
            print(f"\n{rows}, median of {arguments.rounds}")
            print(f"{'way':<15}{'s/step':>8}{'tokens/s':>10}{'speed':>8}{'CPU s':>8}{'speed':>8}{'peak MB':>9}{'start s':>9}{'whole s':>9}")
            for way in WAYS:
                step, cpu, memory, start, whole = (median(runs[way], what) for what in ("step", "cpu", "memory", "start", "whole"))
                tokens, speed, cpu_speed = sum(lengths) / STEPS / step, beside_trl(runs, way, "step"), beside_trl(runs, way, "cpu")
                print(f"{way:<15}{step:>8.2f}{tokens:>10.0f}{speed:>8.2f}{cpu:>8.2f}{cpu_speed:>8.2f}"
                      f"{memory:>9.0f}{start:>9.1f}{whole:>9.1f}", flush=True)  # fmt: skip
            for peer, goal in GOALS[rows].items():
                for what, title, unit, wanted in (
                    ("step", "a step", "s", goal),
                    ("cpu", "a step: CPU", "s", goal),
                    ("memory", "peak memory", "MB", 1.0),
                ):
                    ours, theirs = median(runs["ours"], what), median(runs[peer], what)
                    add_row(arguments.rows, f"sft: {rows}, {title}", ours, peer, theirs, unit, wanted)


def beside_trl(runs: dict[str, list[Run]], way: str, what: str) -> float:
    """Return the ratio of speeds, by round: other load on the machine changes more slowly than that."""
    return statistics.median(getattr(theirs, what) / getattr(run, what) for theirs, run in zip(runs["TRL"], runs[way], strict=True))


def median(runs: list[Run], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


if __name__ == "__main__":
    main()
