"""Settings of a stage's inference engine: vLLM, a server in its own runtime.

Like everything under `resources`, they only change how a stage runs. Whether an engine is used, and its version, are in the
key, because another engine samples other tokens.
"""

from __future__ import annotations

from pydantic import Field

from tuneline.kinds.fields import Name, Strict

CPU_RUNTIME, GPU_RUNTIME = "vllm-cpu", "vllm"
MAX_LORA_RANK = 512
"""Highest rank that vLLM's kernels support (`MaxLoRARanks` in vllm/config/lora.py)."""


class EngineSettings(Strict):
    """Settings of the vLLM server, under vLLM's names."""

    runtime: Name | None = None
    """Runtime with vLLM installed; by default `vllm` if the stage has GPUs, else `vllm-cpu`."""
    gpus: int = Field(0, ge=0)
    """Number of the stage's GPUs reserved for the engine, the last ones (its tensor parallel size); with 0 it shares the first GPU."""
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
