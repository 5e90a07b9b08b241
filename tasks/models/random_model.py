"""Writes models of random weights for `tuneline doctor --gpu`, which has no hub, and measures how fast the device multiplies matrices.

    python -m tasks.models.random_model FOLDER '{"1b": {"hidden_size": 2048, ...}}'

Each model is a Llama of that configuration in FOLDER/NAME. Its tokenizer has a token per byte and ChatML. Prints the measurement as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.models.loading import device

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEVIATION = 0.02  # of the weights


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        additional_special_tokens=list(SPECIAL[1:]),
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        chat_template=CHATML,
    )


def save_model(folder: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a model. Its weights are drawn one tensor at a time, on the device."""
    words = tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = LlamaConfig(**fields, **ends, architectures=["LlamaForCausalLM"], dtype=dtype)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    torch.manual_seed(0)
    weights = {}
    for name, parameter in empty.named_parameters():  # tied ones once
        drawn = torch.empty(parameter.shape, dtype=dtype, device=device())
        weights[name] = (drawn.fill_(1) if "norm" in name else drawn.normal_(0, DEVIATION)).cpu()
    folder.mkdir(parents=True)
    save_torch_state_dict(weights, folder)
    config.save_pretrained(folder)
    words.save_pretrained(folder)


def matmul_flops(dtype: torch.dtype, size: int) -> float:
    """Return the floating-point operations per second of a product of square matrices, at best of ten: what a training could reach."""
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    folder, configurations = Path(sys.argv[1]), json.loads(sys.argv[2])
    on_gpu = device() == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for name, fields in configurations.items():
        save_model(folder / name, fields, dtype)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    print(json.dumps({"device": name, "memory": memory, "matmul_flops": matmul_flops(dtype, 8192 if on_gpu else 512)}))


if __name__ == "__main__":
    main()
