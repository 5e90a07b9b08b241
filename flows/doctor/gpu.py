"""`tuneline doctor --gpu`: run real pipelines on models of random weights, and judge what they show about this machine's GPU.

Needs one GPU, the runtimes, and neither the hub nor rows of yours; at most about ten minutes. `--size tiny` runs the same on pico models,
with or without a GPU. What is missing is left out with a warning: vLLM without its runtime, and trainings of 8B that the GPU cannot hold.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.doctor.check import OK, PROBLEM, WARNING, Check
from flows.folders import home_of
from flows.machine import visible_gpus
from tuneline import api
from tuneline.config.load import Loaded
from tuneline.kinds.engine import GPU_RUNTIME
from tuneline.paths import PACKAGES_ROOT
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.runtimes import find_runtime

LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
PICO = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
SAME = 0.01  # relative difference of losses that differ by rounding alone, in bfloat16
NEAR = 0.05  # of losses before and after a quantization to 4 bits
TIMEOUT = 240  # seconds of a stage
RESERVE = 1.25  # memory of a training of 8B by the size of its weights


@dataclass(frozen=True)
class Size:
    models: dict[str, dict[str, Any]]
    length: int
    """Characters of a row, which are its tokens."""
    steps: int
    rows: int
    """Rows of a step."""


SIZES = {
    "full": Size({"small": LLAMA_1B, "large": LLAMA_8B, "cut": LLAMA_8B | {"num_hidden_layers": 8}}, length=900, steps=12, rows=16),
    "tiny": Size(
        {"small": PICO, "large": PICO | {"num_hidden_layers": 4}, "cut": PICO | {"num_hidden_layers": 3}}, length=120, steps=4, rows=4
    ),
}


def examine_gpu(loaded: Loaded, size_name: str, say: Callable[[str], None]) -> list[Check]:
    """Run all checks, and write them to `.tuneline/gpu-check/result.json`."""
    size, gpus = SIZES[size_name], len(visible_gpus())
    if not gpus and size_name != "tiny":
        return [Check("GPU", PROBLEM, "no GPU is visible", "check the driver and CUDA_VISIBLE_DEVICES; `--size tiny` runs without")]
    runtimes = {name: find_runtime(name, loaded.spec, loaded.root) for name in ("torch", "quantize", GPU_RUNTIME)}
    if not runtimes["torch"].ready:
        return [Check("runtime torch", PROBLEM, "is not set up", "tuneline setup")]
    if folder := runtimes["torch"].folder:
        os.environ["TUNELINE_RUNTIMES"] = str(folder.parent)  # the checks' project has none of its own
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = home_of(loaded.root) / "gpu-check"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    say(f"writing models of random weights to {root}")
    facts = make_models(runtimes["torch"].python, root / "models", size)
    fits = size_name == "tiny" or facts["memory"] > RESERVE * 2 * parameters(LLAMA_8B)
    stages = stages_of(size, min(1, gpus))
    left_out = {} if fits else {"lora-8b": f"a GPU of {facts['memory'] / 2**30:.0f} GiB does not hold 8B in bfloat16"}
    left_out |= {} if runtimes["quantize"].ready else {"gptq": "the runtime quantize is not set up: `tuneline setup`"}
    if not gpus or not runtimes[GPU_RUNTIME].ready:
        left_out["grpo"] = f"the runtime {GPU_RUNTIME} is not set up: `tuneline setup {GPU_RUNTIME}`" if gpus else "vLLM is checked on GPUs"
    write_project(root, {name: stage for name, stage in stages.items() if name not in left_out}, size)

    checks = [Check("device", OK, f"{facts['device']}: {facts['matmul_flops'] / 1e12:.3g} TFLOP/s in a matmul")]
    checks += Results(root, facts["matmul_flops"]).checks()
    checks += [Check(name, WARNING, f"left out: {why}") for name, why in left_out.items()]
    document = facts | {"size": size_name, "checks": [asdict(check) for check in checks]}
    (root / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(root / "models")
    say(f"written: {root / 'result.json'}")
    return checks


# --- the project ------------------------------------------------------------------------------------------------------


def make_models(python: Path, folder: Path, size: Size) -> dict[str, Any]:
    """Write the models; return the device, its memory and the speed of its matmul."""
    command = [str(python), "-m", "tasks.models.random_model", str(folder), json.dumps(size.models)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES_ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def parameters(config: dict[str, int]) -> int:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    keys = width * config["num_key_value_heads"] // heads
    layer = width * (2 * width + 2 * keys + 3 * config["intermediate_size"])
    return config["num_hidden_layers"] * layer + config["vocab_size"] * width * (1 if config["tie_word_embeddings"] else 2)


def stages_of(size: Size, gpus: int) -> dict[str, dict[str, Any]]:
    """Return the stages by name; those whose name begins with `lora` or `qlora` are timed."""
    here, common = {"gpus": gpus}, {"retries": 0, "timeout": TIMEOUT}
    training = common | {
        "kind": "sft", "dataset": "rows", "max_steps": size.steps, "global_batch_size": size.rows, "learning_rate": 1e-3,
        "resources": here | {"micro_batch_size": size.rows // 2},
    }  # fmt: skip
    saving = here | {"micro_batch_size": size.rows // 4, "gradient_checkpointing": True}
    scored = common | {"kind": "evaluate", "datasets": ["rows"], "max_new_tokens": 8, "limit": 16, "resources": here}
    return {
        **{name: {"kind": "model", "path": f"models/{name}", **common} for name in size.models},
        "rows": common | {
            "kind": "dataset", "model": "small", "sources": [{"type": "files", "path": "rows.jsonl"}], "split": {"test": 0.1},
        },
        "lora-1b": training | {"model": "small"},
        "qlora-8b": training | {"model": "large", "method": "qlora", "resources": saving},
        "lora-8b": training | {"model": "large", "resources": saving},
        "eval-adapter": scored | {"model": "lora-1b"},
        "merged": {"kind": "merge", "adapters": ["lora-1b"], **common},
        "eval-merged": scored | {"model": "merged"},
        "gptq": common | {
            "kind": "quantize", "model": "cut", "calibration": "rows", "samples": 32, "group_size": 32, "resources": here,
        },
        "grpo": training | {
            "kind": "grpo", "model": "small", "rewards": [{"type": "length", "full_up_to": 8, "zero_from": 64}], "lora": {"r": 32},
            "max_steps": 2, "num_generations": 4, "max_completion_length": 64, "rollouts": {"engine": "vllm"},
        },
    }  # fmt: skip


def write_project(root: Path, stages: dict[str, dict[str, Any]], size: Size) -> None:
    """Write the pipelines and rows. `sdpa` trains as `lora-1b` does, under another key because of its salt."""
    sdpa = {name: stages[name] for name in ("small", "rows")}
    one = stages["lora-1b"]
    sdpa["lora-1b"] = one | {"resources": one["resources"] | {"attn_implementation": "sdpa"}}
    pipelines = {"check": {"stages": stages}, "sdpa": {"salt": "sdpa", "stages": sdpa}}
    text = yaml.safe_dump({"version": 1, "pipelines": pipelines}, sort_keys=False)
    (root / "pipelines.yaml").write_text(text, encoding="utf-8")
    rows = []
    for i in range(max(64, size.steps * size.rows // 2)):
        answer = f"It is {i % 7}. " * (size.length // 10)
        rows.append(json.dumps({"prompt": f"What is {i} modulo 7?", "completion": answer[: size.length * (2 + i % 3) // 4]}) + "\n")
    (root / "rows.jsonl").write_text("".join(rows), encoding="utf-8")


# --- what the runs show -----------------------------------------------------------------------------------------------


class Results:
    """Runs both pipelines and compares what they made."""

    def __init__(self, root: Path, matmul_flops: float):
        file = root / "pipelines.yaml"
        self.matmul_flops = matmul_flops
        self.run, self.sdpa = api.run("check", file, check=False), api.run("sdpa", file, check=False)

    def checks(self) -> Iterator[Check]:
        for name, stage in self.run.stages.items():
            if stage.status not in ("done", "cached"):
                yield Check(name, PROBLEM, stage.message or stage.status, f"tuneline log of {self.run.id}: {self.run.report}")
            elif name.startswith(("lora", "qlora")):
                yield self.training(self.run, name)
            else:
                figures = ", ".join(f"{figure} {value:.4g}" for figure, value in list(stage.metrics.items())[:3])
                yield Check(name, OK, f"{stage.seconds:.0f} s{', ' if figures else ''}{figures}")
        if self.sdpa.state == "completed":
            yield self.training(self.sdpa, "lora-1b", "lora-1b with sdpa")
        else:
            yield Check("lora-1b with sdpa", PROBLEM, f"the run {self.sdpa.state}", str(self.sdpa.report))
        yield from self.compared(
            "attention: the first loss", self.first_loss(self.run, "lora-1b"), self.first_loss(self.sdpa, "lora-1b"), SAME
        )
        first, second = (self.first_loss(self.run, name) for name in ("qlora-8b", "lora-8b"))
        yield from self.compared("4 bits beside bfloat16: the first loss", first, second, NEAR)
        one, other = (self.run.metrics.get(name, {}).get("rows/bits_per_byte") for name in ("eval-adapter", "eval-merged"))
        yield from self.compared("merged beside adapter: bits per byte", one, other, SAME)

    def training(self, run: api.Run, name: str, shown: str = "") -> Check:
        """Judge a training by its losses, and report its speed."""
        artifact = self.artifact(run, name)
        assert artifact is not None
        losses = self.losses(artifact)
        info, weights = artifact.manifest.info, artifact.manifest.metrics["all_parameters"]
        speed = info["tokens_per_second"]
        # A frozen weight takes two operations per token in the forward pass, and two in the backward pass (arXiv:2001.08361).
        share = 4 * weights * speed / self.matmul_flops
        memory = info.get("peak_device_memory", info["peak_memory"]) / 2**30
        found = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {speed:,.0f} tokens/s, {share:.0%} of a matmul's speed, {memory:.1f} GiB"
        found += f", {info['attention']}"
        return Check(shown or name, OK if losses[-1] < losses[0] else PROBLEM, found, "" if losses[-1] < losses[0] else "it learns nothing")

    def compared(self, what: str, one: float | None, other: float | None, allowed: float) -> Iterator[Check]:
        if one is not None and other is not None:
            apart = abs(one - other) / other
            yield Check(what, OK if apart <= allowed else PROBLEM, f"{one:.4f} and {other:.4f}: {apart:.2%} apart, expected {allowed:.0%}")

    def first_loss(self, run: api.Run, name: str) -> float | None:
        artifact = self.artifact(run, name)
        return self.losses(artifact)[0] if artifact else None

    def artifact(self, run: api.Run, name: str) -> Artifact | None:
        entry = run.stages.get(name)
        return run.workspace.store.find(entry.kind, entry.key) if entry and entry.key and entry.artifact else None

    def losses(self, artifact: Artifact) -> list[float]:
        lines = (artifact.path / "meta" / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
