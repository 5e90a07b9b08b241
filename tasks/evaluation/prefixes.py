"""Computes the beginning that the sequences of a batch share, such as a system prompt or examples, once instead of for each.

Not for models with sliding windows or recurrent states, in whose caches padding after the beginning would be text: `suits` compares the
logits of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.models.padding import PADS, differs, takes_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 16  # tokens: computing fewer once, one row after the other, takes longer than computing them for each


def common(sequences: Sequence[list[int]], most: int) -> int:
    """Return how many first tokens all sequences share, at most `most`; 0 if too few to be worth it."""
    first, last = min(sequences), max(sequences)
    length = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
    length = min(length, most)
    return length if length >= SHORTEST and len(sequences) > 1 else 0


def begin(model: PreTrainedModel, tokens: Sequence[int], rows: int) -> Any:
    """Return the cache of a batch of `rows` that begin with these tokens."""
    import torch

    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=True, **last).past_key_values
        cache.batch_repeat_interleave(rows)
    return cache


def suits(model: PreTrainedModel, prompt: list[int], pad: int) -> bool:
    """Return whether the logits of a prompt stay the same if its beginning is computed before, and padding follows it."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not takes_cache(model) or "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    half = len(prompt) // 2
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        alone = model(input_ids=ids, use_cache=True)
        cache = alone.get("past_key_values")
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return False
        rest = torch.cat([ids.new_full((1, PADS), pad), ids[:, half:]], dim=1)
        mask = torch.ones((1, half + rest.shape[1]), dtype=torch.long, device=ids.device)
        mask[:, half : half + PADS] = 0
        positions = (mask.cumsum(-1) - 1)[:, half:]
        parted = model(input_ids=rest, attention_mask=mask, position_ids=positions, past_key_values=begin(model, prompt[:half], 1))
    return not differs(alone.logits[0, -1], parted.logits[0, -1])
