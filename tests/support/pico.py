"""Pico models for the tests: two layers, 64 wide, with SmolLM2's real tokenizer and template. Needs the torch runtime.

Also a program of its own (`python tests/support/pico.py FOLDER [WIDTH]`), for tests that run under the orchestrator's Python.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

GGUF = Path(__file__).resolve().parents[2] / "infra" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def tokenizer() -> Any:
    """SmolLM2's tokenizer. Reading it from the GGUF takes seconds, so it is kept beside it."""
    from transformers import AutoTokenizer

    kept = Path(__file__).resolve().parents[2] / ".cache" / "smollm2-tokenizer"
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


def teach(folder: Path, conversations: list[list[dict[str, Any]]], steps: int = 60) -> Path:
    """Trains all weights of a pico model in a folder until it answers as in the conversations, each as often as the others."""
    import torch
    from transformers import AutoModelForCausalLM

    words, model = tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    texts = [words.apply_chat_template(turns, tokenize=False) for turns in conversations]
    batch = words(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    prompts = [len(words.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]) for turns in conversations]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in zip(labels, prompts, strict=True):
        row[:length] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save_pico(Path(sys.argv[1]), width=int(sys.argv[2]) if len(sys.argv) > 2 else 64)
