"""Computes what sequences of a batch begin with once instead of for each: a system prompt, or a question with several answers.

Not for models with local attention or recurrent states, for which padding after the beginning would be text, nor for those whose rotary
frequencies depend on the length: `suits` looks for these, and compares the logits of a prompt.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.models.padding import PADS, differs, switches_at, takes_cache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHORTEST = 16  # tokens: computing fewer once, one row after the other, takes longer than computing them for each


def common(sequences: Sequence[list[int]], most: int) -> int:
    """Return how many first tokens all sequences share, at most `most`; 0 if too few to be worth it."""
    first, last = min(sequences), max(sequences)
    length = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
    length = min(length, most)
    return length if length >= SHORTEST and len(sequences) > 1 else 0


def beginnings(sequences: Sequence[list[int]], starts: Sequence[int], most: int) -> tuple[list[list[int]], list[int]]:
    """Return what to compute before the rest of the sequences, and for each sequence which of it. These are the contexts, each up to its
    start, or what all sequences share: whichever leaves fewer tokens to compute. Both are empty if neither is worth it. `most`: tokens
    that the model has positions for."""
    own = [tuple(tokens[:start]) for tokens, start in zip(sequences, starts, strict=True)]
    contexts = list(dict.fromkeys(own))
    shared = common(sequences, min(starts))
    saved = sum(starts) - len(contexts) * max(starts)  # contexts are padded to the longest
    padded = max(starts) + max(len(tokens) - start for tokens, start in zip(sequences, starts, strict=True))
    if padded <= most and min(starts) and saved >= SHORTEST and saved > shared * (len(sequences) - 1):
        return [list(context) for context in contexts], [contexts.index(context) for context in own]
    return ([sequences[0][:shared]], [0] * len(sequences)) if shared else ([], [])


def begin(model: PreTrainedModel, begun: Sequence[list[int]], rows: Sequence[int]) -> tuple[Any, torch.Tensor]:
    """Return the cache of a batch whose rows begin with these sequences, and its attention mask. `rows`: the sequence of each row."""
    import torch

    width = max(map(len, begun))
    pads = [width - len(tokens) for tokens in begun]
    ids = torch.tensor([[0] * pad + tokens for pad, tokens in zip(pads, begun, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
    chosen = torch.tensor(rows, device=model.device)
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **last).past_key_values
        cache.batch_select_indices(chosen)
    return cache, mask[chosen]


def suits(model: PreTrainedModel, prompt: list[int], pad: int) -> bool:
    """Return whether the logits of a prompt stay the same if its beginning is computed before, and padding follows it."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not takes_cache(model) or "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    if switches_at(base) < math.inf or hasattr(base.config, "window_size"):  # GPT-Neo's windows count padding
        return False
    prompt = prompt if len(prompt) > 1 else prompt * 2
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
        parted = model(input_ids=rest, attention_mask=mask, position_ids=positions, past_key_values=begin(model, [prompt[:half]], [0])[0])
    return not differs(alone.logits[0, -1], parted.logits[0, -1])
