"""Configurations of real architectures, and a pipeline whose estimates are compared with them."""

from __future__ import annotations

from typing import Any


def config(
    model_type: str, width: int, mlp: int, layers: int, heads: int, key_heads: int, vocabulary: int, **fields: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary, "torch_dtype": "bfloat16", **fields,
    }  # fmt: skip


# Published configurations. Qwen's first generation has code of its own, in which the MLP's halves count as one; the sizes are the same.
CONFIGS = {
    "SmolLM2-135M": config("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "Qwen2.5-0.5B": config("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "Qwen2.5-7B": config("qwen2", 3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
    "Qwen2.5-72B": config("qwen2", 8192, 29568, 80, 64, 8, 152064, tie_word_embeddings=False),
    "Qwen3-0.6B": config("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
    "Llama-2-7B": config("llama", 4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": config("llama", 4096, 14336, 32, 32, 8, 128256),
    "Mistral-7B-v0.1": config("mistral", 4096, 14336, 32, 32, 8, 32000),
    "Gemma-2B": config("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256),
    "LLaMA-65B": config("llama", 8192, 22016, 80, 64, 64, 32000),
    "Qwen-1.8B": config("qwen2", 2048, 5504, 24, 16, 16, 151936),
    "Qwen-7B": config("qwen2", 4096, 11008, 32, 32, 32, 151936),
    "Qwen-14B": config("qwen2", 5120, 13696, 40, 40, 40, 152064),
    "Qwen-72B": config("qwen2", 8192, 24576, 80, 64, 64, 152064),
}


PIPELINE = """\
version: 1
pools: {gpu: {type: process, gpu_memory: 24Gi}, large: {type: process, gpu_memory: 80Gi}, unsaid: {type: process}}
pipelines:
  demo:
    pool: gpu
    stages:
      base:   {kind: model, path: base}
      data:   {kind: dataset, model: base, sources: [{type: files, path: rows.jsonl}], max_length: 2048}
      sft:    {kind: sft, model: base, dataset: data, max_length: 4096, resources: {gpus: 1}}
      merged: {kind: merge, adapters: [sft]}
      again:  {kind: sft, model: merged, dataset: data, max_length: 512}
"""
