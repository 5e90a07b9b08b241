"""Pico models for the tests: two layers, 64 wide, with SmolLM2's tokenizer and template. Needs the torch runtime.

Also a program of its own (`python tests/support/pico.py FOLDER [WIDTH]`), for tests that run under the orchestrator's Python.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GGUF = ROOT / "infra" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


SMALL = 9_700
"""Tokens that the tests' tokenizer knows: the first of SmolLM2's, enough for the tests' rows. It is read and trained on in a third of the time."""


def tokenizer(*, whole: bool = False) -> Any:
    """SmolLM2's tokenizer, with its template and special tokens; all 49,152 tokens of it if `whole`.

    Both are kept: to read the tokenizer from the GGUF takes seconds.
    """
    from transformers import AutoTokenizer

    kept = ROOT / ".cache" / ("smollm2-tokenizer" if whole else f"smollm2-tokenizer-{SMALL}")
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:  # and renamed: another pytest may do the same at this moment
            made = Path(name, "made")
            if whole:
                AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name).save_pretrained(made)
            else:
                tokenizer(whole=True).save_pretrained(made)
                cut(made / "tokenizer.json")
            with contextlib.suppress(OSError):
                made.rename(kept)
    return AutoTokenizer.from_pretrained(kept)


def cut(file: Path) -> None:
    """Leaves the first tokens, and the merges that make them: tokens are numbered in the order of their merges."""
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < SMALL}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def save_pico(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    tied: bool = True,
    dtype: str = "float32",
    vocabulary: int | None = None,
    whole: bool = False,
) -> Path:
    """Saves a random pico Llama as a Hugging Face folder; returns the folder.

    `vocabulary` is the number of tokens that it knows, the tokenizer's if None; `whole` gives it SmolLM2's whole tokenizer.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(whole=whole)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary or len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=tied, initializer_range=0.1,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def teach(folder: Path, conversations: list[list[dict[str, Any]]], steps: int = 60, template: str = "") -> Path:
    """Trains all weights of a pico model in a folder until it answers as in the conversations, each as often as the others: under
    SmolLM2's template, or another one, which is saved with it."""
    import torch
    from transformers import AutoModelForCausalLM

    words, model = tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    words.chat_template = template or words.chat_template
    words.save_pretrained(folder)
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
