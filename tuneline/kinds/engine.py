"""The inference engine of a stage, as types: vLLM, a server in a runtime of its own.

What is here only changes how a stage runs, like everything under `resources`. That an engine is used, and its version, is in
the key: another engine samples other tokens.
"""

from __future__ import annotations

from pydantic import Field

from tuneline.kinds.fields import Name, Strict

CPU_RUNTIME, GPU_RUNTIME = "vllm-cpu", "vllm"
MAX_LORA_RANK = 512
"""vLLM's kernels know ranks up to this one (`MaxLoRARanks` in vllm/config/lora.py)."""


class EngineSettings(Strict):
    """How vLLM's server runs, in vLLM's words."""

    runtime: Name | None = None
    """Python environment that holds vLLM; by default `vllm` where the stage has GPUs, else `vllm-cpu`."""
    gpus: int = Field(0, ge=0)
    """How many of the stage's GPUs, the last ones, are the engine's alone (its tensor parallel size); with 0 it shares the first."""
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    """Share of each of its GPUs that it takes for weights and cache."""
    cpu_memory: float = Field(1.0, gt=0)
    """GiB for its cache where there is no GPU."""
    max_model_len: int | None = Field(None, ge=16)
    """Tokens of a prompt and its completion; by default as many as the longest ones of the stage take."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences that it works on at the same time."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of its cache; by default as vLLM chooses for the device."""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner and takes less memory, slower."""
    start_timeout: int = Field(900, ge=1)
    """Seconds that it may take to come up."""
