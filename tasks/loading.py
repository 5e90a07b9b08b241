"""Models and tokenizers out of artifacts, the same way in every program: local files only, safetensors only, no remote code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.gptq import is_gptq, load_dense
from tuneline.protocol import Input
from tuneline.reference import folder_of as model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(dtype: str = "auto") -> torch.dtype:
    """`auto` is bfloat16 where matrix products are fast in it (a GPU that has it), else float32: AVX2 is 100 times slower in bf16."""
    import torch

    if dtype == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_tokenizer(source: Input) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a Model or an Adapter (the trained side's), with a padding token."""
    from transformers import AutoTokenizer

    folder = model_folder(source.path) if source.type == "Model" else source.path
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: Input, dtype: torch.dtype, place: str | None = None) -> PreTrainedModel:
    """A Model, or an Adapter on its base as a PeftModel, in evaluation mode on `place`, by default the first device.

    A GPTQ model is decoded where there is no GPU, because its kernels are slow there (see `tasks.gptq`); on a GPU it is
    transformers' own, through optimum, placed while it is loaded because its kernels are chosen for the device.
    """
    from transformers import AutoModelForCausalLM

    base = source.base if source.type == "Adapter" else source
    assert base is not None
    folder = model_folder(base.path)
    if is_gptq(folder) and device() == "cpu":
        model = load_dense(folder, dtype)
    else:
        placed = {"": place or device()} if is_gptq(folder) else None
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=placed, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    if source.type == "Adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source.path)
    return model.to(place or device()).eval()  # type: ignore[no-any-return]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 of the chat template; it travels in every manifest."""
    template = tokenizer.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, payload: Path) -> None:
    """Saves tokenizer and chat_template.jinja into an artifact's payload."""
    tokenizer.save_pretrained(payload)
