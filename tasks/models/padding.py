"""Whether tokens of padding, on the left of a prompt, change what a model makes of it.

A batch of prompts is padded on the left. Attention leaves padding out by its mask, and positions are counted without it; the states of
RWKV and xLSTM take it in as text, and GPT's positions count it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PADS = 3
SHARE = 0.05  # of the spread of a prompt's logits: rounding stays far below, padding that is read as text changes a fifth of it and more


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model takes back what it hands out as `past_key_values`; Mamba and its like have states of other names, which
    transformers' own `generate` knows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "past_key_values" in inspect.signature(base.forward).parameters


def padding_matters(model: PreTrainedModel, prompt: list[int], pad: int) -> bool:
    """`prompt` and `pad` are token ids."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    padded = torch.cat([ids.new_full((1, PADS), pad), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :PADS] = 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_cache(model) else {}
    with torch.inference_mode():
        alone = model(input_ids=ids).logits[0, -1].float()
        beside = model(input_ids=padded, attention_mask=mask, **positions).logits[0, -1].float()
    return bool((alone - beside).norm() > SHARE * (alone - alone.mean()).norm())
