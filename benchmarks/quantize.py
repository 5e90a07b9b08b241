"""Compare the quantize stage with llmcompressor's GPTQ: seconds, peak memory and perplexity, with the same model, rows and settings.

    PYTHONPATH=. <python of the torch runtime> benchmarks/quantize.py --peer .cache/bench-llmcompressor/bin/python [--layers 8]

The model is the demo's SmolLM2-135M-Instruct (its first layers only, with --layers), the rows are the demo's: 64 of the train split
calibrate, 64 of the test split measure. 4 bits, group size 32, symmetric. Each side runs in a process of its own, by turns, and the
medians count. Ours is the whole program of the stage: imports, perplexity before and after, and the checks of the hand-over. Theirs is
imports, loading in float32, `oneshot` with its defaults, and saving; its perplexity is measured apart, by the same code and rows.
llmcompressor cannot share an environment with the runtime (it wants an older transformers), hence --peer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from table import add_row  # noqa: E402

from tuneline.workspace.protocol import Input, Result  # noqa: E402

GGUF = ROOT / "infra" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = ROOT / "infra" / "demo" / "bookings.jsonl"
BITS, GROUP_SIZE, SAMPLES = 4, 32, 64


def stage_config() -> dict[str, Any]:
    settings = {"bits": BITS, "group_size": GROUP_SIZE, "samples": SAMPLES, "max_perplexity_ratio": 100}
    return {"kind": "quantize", "model": "base", "calibration": "rows", **settings}


def prepare(folder: Path, layers: int | None) -> None:
    """Write `model/`, `dataset/`, and `rows.json`: the token ids of the rows that our stage draws for calibration and for perplexity."""
    import torch
    from program_tools import make_request, run_program
    from transformers import AutoModelForCausalLM

    from tasks.convert.quantize import calibration_rows, measured_rows
    from tasks.models.loading import load_tokenizer
    from tuneline.kinds.quantize import QuantizeStage
    from tuneline.workspace.protocol import Events

    request = make_request(folder / "model", {"kind": "model", "gguf": str(GGUF)}, {}, files={"gguf": [GGUF]})
    run_program(request)
    model = Input(path=request.payload, digest="", type="Model")
    if layers:
        whole = AutoModelForCausalLM.from_pretrained(request.payload, dtype=torch.float32)
        whole.model.layers = whole.model.layers[:layers]
        whole.config.num_hidden_layers, whole.config.layer_types = layers, None
        whole.save_pretrained(request.payload)
    config = {"kind": "dataset", "model": "base", "sources": [{"type": "files", "path": str(ROWS)}]}
    request = make_request(folder / "dataset", config, {"model": model}, files={"sources.0.path": [ROWS]})
    run_program(request)
    stage, tokenizer = QuantizeStage.model_validate(stage_config()), load_tokenizer(model)
    dataset = Input(path=request.payload, digest="", type="Dataset")
    calibration = calibration_rows(dataset, tokenizer, stage, Events(folder / "events.jsonl"))
    measured = measured_rows(dataset, tokenizer, stage)[1]
    (folder / "rows.json").write_text(json.dumps({"calibration": calibration, "measured": measured}))


def ours(folder: Path, number: int) -> tuple[float, float, dict[str, float]]:
    """Return seconds, peak megabytes and metrics of the stage's program; print how long its parts took."""
    from program_tools import make_request

    model, dataset = folder / "model" / "out" / "payload", folder / "dataset" / "out" / "payload"
    inputs = {"model": Input(path=model, digest="", type="Model"), "calibration": Input(path=dataset, digest="", type="Dataset")}
    request = make_request(folder / f"ours-{number}", stage_config(), inputs)
    request.write(request.work / "request.json")
    begun = time.time()
    seconds, memory = cost([sys.executable, "-m", "tasks", str(request.work / "request.json")], request.work)
    events = [json.loads(line) for line in (request.work / "events.jsonl").read_text().splitlines()]
    before = next(event["t"] for event in events if "perplexity before" in event.get("message", ""))
    last = max(event["t"] for event in events if "block by block" in event.get("message", ""))
    print(f"  ours: start and perplexity before {before - begun:.0f} s, load and quantize {last - before:.0f} s, "
          f"write, check, perplexity after {begun + seconds - last:.0f} s", flush=True)  # fmt: skip
    return seconds, memory, Result.read(request.work / "result.json").metrics


def peer(folder: Path, out: Path) -> None:
    """Quantize with llmcompressor; runs under its Python."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    rows = json.loads((folder / "rows.json").read_text())["calibration"]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(folder / "model" / "out" / "payload", dtype=torch.float32)
    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=2048)
    model.save_pretrained(out, save_compressed=True)


def perplexity(model: Path, rows: Path) -> float:
    """Compute its perplexity with the code that measures ours; runs under the peer's Python."""
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.convert.quantize import mean_loss

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return math.exp(mean_loss(loaded, json.loads(rows.read_text())["measured"]))


def cost(command: list[str], folder: Path) -> tuple[float, float]:
    """Return (seconds, peak megabytes) of a new process, with the supervisor's threads and settings."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    start = time.perf_counter()
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}\n{(folder / 'output.txt').read_text(errors='replace')[-4000:]}")
    return seconds, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path, help="Python of an environment with llmcompressor; without it ours is measured alone")
    parser.add_argument("--layers", type=int, help="of the model's 30; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="file that the rows of the common table are appended to")
    parser.add_argument("--as", dest="role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        role, *paths = arguments.role
        if role == "prepare":
            prepare(Path(paths[0]), arguments.layers)
        elif role == "peer":
            peer(Path(paths[0]), Path(paths[1]))
        else:
            print(perplexity(Path(paths[0]), Path(paths[1])))
        return

    theirs_python = str(arguments.peer.absolute()) if arguments.peer else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = ["--layers", str(arguments.layers)] if arguments.layers else []
        cost([sys.executable, __file__, *layers, "--as", "prepare", name], folder)
        our_costs, their_costs, metrics, compressed = [], [], dict[str, float](), folder / "compressed"
        for number in range(arguments.rounds):
            seconds, memory, metrics = ours(folder, number)
            our_costs.append((seconds, memory))
            if theirs_python:
                their_costs.append(cost([theirs_python, __file__, "--as", "peer", name, str(compressed)], folder))
        print(f"\n{'median of ' + str(arguments.rounds):<16}{'seconds':>9}{'peak MB':>9}{'perplexity':>12}{'weights MB':>12}")
        print(f"{'source':<16}{'':>18}{metrics['perplexity_before']:>12.3f}{metrics['bytes_before'] / 1e6:>12.0f}")
        our_seconds, our_memory = (statistics.median(figures) for figures in zip(*our_costs, strict=True))
        print(f"{'our stage':<16}{our_seconds:>9.1f}{our_memory:>9.0f}{metrics['perplexity']:>12.3f}{metrics['bytes'] / 1e6:>12.0f}")
        if not theirs_python:
            return
        cost([theirs_python, __file__, "--as", "perplexity", str(compressed), str(folder / "rows.json")], folder)
        their_perplexity = float((folder / "output.txt").read_text().splitlines()[-1])
        their_seconds, their_memory = (statistics.median(figures) for figures in zip(*their_costs, strict=True))
        size = sum(file.stat().st_size for file in compressed.glob("*.safetensors")) / 1e6
        print(f"{'llmcompressor':<16}{their_seconds:>9.1f}{their_memory:>9.0f}{their_perplexity:>12.3f}{size:>12.0f}")
        for what, figure, other, unit in (
            ("seconds", our_seconds, their_seconds, "s"),
            ("peak memory", our_memory, their_memory, "MB"),
            ("perplexity", metrics["perplexity"], their_perplexity, ""),
            ("weights", metrics["bytes"] / 1e6, size, "MB"),
        ):
            add_row(arguments.rows, f"quantize: {what}", figure, "llmcompressor", other, unit, 1.0)


if __name__ == "__main__":
    main()
