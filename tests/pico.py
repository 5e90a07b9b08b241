"""Pico models for the tests: two layers, 64 wide, with SmolLM2's real tokenizer and template. Needs the torch runtime.

Also a program of its own (`python tests/pico.py FOLDER`), for tests that run under the orchestrator's Python.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

GGUF = Path(__file__).parent.parent / "infra" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def tokenizer() -> Any:
    """SmolLM2's tokenizer. Reading it from the GGUF takes seconds, so it is kept beside it."""
    from transformers import AutoTokenizer

    kept = Path(__file__).parent.parent / ".cache" / "smollm2-tokenizer"
    if not (kept / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name).save_pretrained(kept)
    return AutoTokenizer.from_pretrained(kept)


def save_pico(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    tied: bool = True,
    dtype: str = "float32",
    vocabulary: int | None = None,
) -> Path:
    """Saves a random pico Llama as a Hugging Face folder; returns the folder. `vocabulary` cuts the tokens it knows: faster to train."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary or len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=tied, initializer_range=0.1,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save_pico(Path(sys.argv[1]))
