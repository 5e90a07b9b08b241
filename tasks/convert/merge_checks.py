"""Checks a merged model: its tensors' shapes, and its logits against base + adapter."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING, Any

from tasks.data.masks import prompt_ids
from tasks.data.rows import Row
from tasks.models.loading import load_model
from tasks.models.weights import Stored
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "If I have 3 + 4 apples and eat 2, how many are left?",
)
# Largest difference of a logit, as a share of the largest logit, that rounding the weights can cause.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def check_tensors(base: dict[str, Stored], merged: dict[str, Stored], vocabulary: int = 0) -> None:
    """Raises StageFailed(bug) if a tensor has another shape, or was added, such as a tied head. PEFT may rename tensors. An adapter with
    new tokens may enlarge the embeddings and the head to `vocabulary` rows."""
    differ = {name for name in merged.keys() & base.keys() if merged[name].shape != base[name].shape}
    larger = {name for name in differ if [*merged[name].shape] == [vocabulary, *base[name].shape[1:]] and base[name].shape[0] < vocabulary}
    if wrong := sorted(differ - larger):
        message = f"{wrong[0]} of the merged model: found {merged[wrong[0]].shape}, expected the base's {base[wrong[0]].shape}"
        raise StageFailed("bug", message)
    size, most = (
        sum(math.prod(tensor.shape) for tensor in tensors.values()) for tensors in (merged, base | {name: merged[name] for name in larger})
    )
    if size > most:
        extra = ", ".join(sorted(merged.keys() - base.keys()))
        message = f"the merged model: found {size:,} parameters, expected at most the base's {most:,}: {extra} was added, perhaps untied"
        raise StageFailed("bug", message)


def check_logits(adapter: Input, merged: Input, tokenizer: PreTrainedTokenizerBase, dtype: str) -> float:
    """Return the largest difference between a logit of the merged model and of base + adapter, over a few prompts.

    Raises StageFailed if rounding to `dtype` does not explain it, or if less than half of the adapter's effect is left: a wrong
    scale can stay within the first limit if the adapter changes little.
    """
    import torch

    chat = tokenizer.chat_template is not None
    rows = [Row(source="merge", **{"messages": ({"role": "user", "content": t},)} if chat else {"prompt": t}) for t in PROMPTS]
    prompts = [torch.tensor([prompt_ids(row, tokenizer)]) for row in rows]

    def logits(model: Any) -> torch.Tensor:
        model.config.use_cache = False  # xLSTM's cache does not fit its own states
        return torch.cat([model(prompt).logits[0] for prompt in prompts])

    with torch.inference_mode():
        model: Any = load_model(adapter, torch.float32, place="cpu")
        expected = logits(model)
        with model.disable_adapter():
            base = logits(model)
        del model
        gc.collect()  # PEFT's wrappers are a cycle: without this, both models would be in memory
        model = load_model(merged, torch.float32, place="cpu")
        found = logits(model)

    if found.shape != expected.shape:
        raise StageFailed("bug", f"the merged model: found a vocabulary of {found.shape[1]}, expected {expected.shape[1]}, as in the base")
    if len(tokenizer) > found.shape[1]:
        raise StageFailed("data", f"the tokenizer: found {len(tokenizer)} tokens, expected at most the model's {found.shape[1]}")
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    error, effect = float((found - expected).norm()), float((expected - base).norm())
    if effect == 0:
        raise StageFailed("bug", "the adapter changes nothing: logits with and without it are the same", "check the loss of its training")
    hint = "" if dtype == "float32" else f"if rounding to {dtype} is the cause, `dtype: float32` keeps the adapter's changes"
    if not difference <= TOLERANCE[dtype] * scale:
        message = f"logits of the merged model differ from base + adapter by up to {difference:.3g}; the largest is {scale:.3g}"
        raise StageFailed("bug", message, hint)
    if not error < 0.5 * effect:
        message = f"the merged model differs by {error:.3g} from base + adapter, which differs by only {effect:.3g} from the base"
        raise StageFailed("bug" if dtype == "float32" else "data", message, hint)
    return difference
