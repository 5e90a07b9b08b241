"""Compare the merge with PEFT's own merge-and-save and with `cp`: seconds and peak memory.

    PYTHONPATH=. <python of the torch runtime> benchmarks/merge.py [--megabytes 400] [--rounds 5]        (make bench-merge)

Creates a random Llama of that size (bfloat16) with a rank-16 adapter on every linear layer, in one file and in several. Each
method runs in a new process, alternating, and the medians of the rounds count; a ratio is the median of the rounds' ratios.
`seconds` excludes the imports; `peak` is the largest resident memory above that after the imports (none for `cp`, whose memory is the
kernel's). The hand-over check (both models loaded, a few prompts run) is measured separately: PEFT and `cp` have none.
Files are read from the page cache, and the time includes flushing the output to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from table import add_row  # noqa: E402

WAYS = ("cp", "streamed", "PEFT", "check")


def make_model(folder: Path, megabytes: int) -> None:
    """Write a Llama of about this size in bfloat16: one file in `one`, eight shards in `many`; its adapter in `adapter`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from pico import tokenizer

    words, width = tokenizer(whole=True), 1024
    layer = 4 * width * width + 3 * width * 3 * width  # parameters
    layers = max(1, round((megabytes * 1e6 / 2 - len(words) * width) / layer))
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=True, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    for name, size in (("one", "100GB"), ("many", f"{max(1, megabytes // 8)}MB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        words.save_pretrained(folder / name)
    adapter = get_peft_model(model.float(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapter.save_pretrained(folder / "adapter")
    words.save_pretrained(folder / "adapter")


def measured(way: str, folder: Path, shards: str) -> tuple[float, float]:
    """Runs in a new process; returns the seconds and megabytes of one method."""
    import gptqmodel  # noqa: F401  PEFT imports it late, within the time
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  the model class is imported late otherwise

    from tasks.convert import merge
    from tuneline.kinds.merge import MergeStage
    from tuneline.workspace.protocol import Events, Input

    base, out = folder / shards, folder / "out"
    size = "100GB" if shards == "one" else f"{max(path.stat().st_size for path in base.glob('*.safetensors')) / 1e6}MB"
    adapter = Input(path=folder / "adapter", digest="", type="Adapter", base=Input(path=base, digest="", type="Model"))
    if way != "check":
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
    before, start = peak(), time.perf_counter()
    if way == "cp":
        subprocess.run(["cp", "-r", "--reflink=never", str(base), str(out)], check=True)
    elif way == "streamed":
        parts, _ = merge.lora_parts(adapter)
        weights = merge.stored_tensors(base)
        stage = MergeStage(kind="merge", adapters=("sft",), max_shard_size="100GB" if shards == "one" else size)
        merge.merge_streamed(PeftConfig.from_pretrained(adapter.path), parts, weights, out, stage, Events(folder / "events.jsonl"))
        shutil.copyfile(base / "config.json", out / "config.json")
    elif way == "PEFT":
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter.path).merge_and_unload().save_pretrained(out, max_shard_size=size)
    else:
        tokenizer = merge.load_tokenizer(adapter)
        merge.check_logits(adapter, Input(path=out, digest="", type="Model"), tokenizer, "bfloat16")
    for file in out.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    return seconds, peak() - before


def peak() -> float:
    """Return the peak resident memory of this process in megabytes. (getrusage would include the parent's memory at the fork.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def run(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="file that the rows of the common table are appended to")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_model(Path(arguments.make), arguments.megabytes)
        return
    if arguments.measure:
        way, folder, shards = arguments.measure
        print(json.dumps(measured(way, Path(folder), shards)))
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("--make", name, "--megabytes", str(arguments.megabytes))
        size = sum(path.stat().st_size for path in (folder / "one").glob("*.safetensors")) / 1e6
        for shards in ("one", "many"):
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for _ in range(arguments.rounds):
                # PEFT before streamed: the check reads what streamed leaves.
                for way in ("cp", "PEFT", "streamed", "check"):
                    found[way].append(tuple(json.loads(run("--measure", way, name, shards).splitlines()[-1])))
            files = len(list((folder / shards).glob("*.safetensors")))
            title = f"{size:.0f} MB in {files} file{'s' if files > 1 else ''}"
            print(f"\n{title}, median of {arguments.rounds}")
            print(f"{'way':<10}{'seconds':>9}{'peak MB':>9}{'of PEFT':>9}{'of cp':>9}")
            for way in WAYS:
                of_peft, of_cp = share(found, way, "PEFT"), share(found, way, "cp")
                print(f"{way:<10}{median(found, way, 0):>9.2f}{median(found, way, 1):>9.0f}{of_peft:>9.2f}{of_cp:>9.2f}", flush=True)
            for peer, what, goal in (("PEFT", 0, 0.3), ("cp", 0, 1.3), ("PEFT", 1, 0.25)):
                what_for, unit = (("time", "s"), ("peak memory", "MB"))[what]
                ours, theirs = median(found, "streamed", what), median(found, peer, what)
                add_row(arguments.rows, f"merge: {what_for}, {title}", ours, peer, theirs, unit, goal)


def median(found: dict[str, list[tuple[float, float]]], way: str, what: int) -> float:
    return statistics.median(figures[what] for figures in found[way])


def share(found: dict[str, list[tuple[float, float]]], way: str, other: str) -> float:
    """Return the ratio of the seconds, by round: other load on the machine changes more slowly than that."""
    return statistics.median(ours[0] / theirs[0] for ours, theirs in zip(found[way], found[other], strict=True))


if __name__ == "__main__":
    main()
