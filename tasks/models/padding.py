"""Checks whether padding on the left of a prompt changes what a model computes for it.

A batch of prompts is padded on the left. Attention masks padding, and positions are counted without it. But the states of RWKV and
xLSTM read padding as text, and GPT's positions count it.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PADS = 3
SHARE = 0.05  # of the spread of a prompt's logits: rounding stays far below; padding read as text changes a fifth of it or more


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether a model accepts the `past_key_values` that it returns. The states of Mamba and similar models have other names,
    which transformers' own `generate` knows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "past_key_values" in inspect.signature(base.forward).parameters


def switches_at(model: PreTrainedModel) -> float:
    """Return the number of tokens above which a model's rotary frequencies are others (Phi-3's `longrope`). The longest sequence of a batch
    decides about all of them."""
    rope: dict[str, Any] = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    parts = [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("rope_type") == "longrope"]
    return min((float(each["original_max_position_embeddings"]) for each in parts), default=math.inf)


def padding_matters(model: PreTrainedModel, prompt: list[int], pad: int) -> bool:
    """Return whether padding changes the logits. `prompt` and `pad` are token ids."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    padded = torch.cat([ids.new_full((1, PADS), pad), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :PADS] = 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes_cache(model) else {}
    with torch.inference_mode():
        alone = model(input_ids=ids).logits[0, -1]
        beside = model(input_ids=padded, attention_mask=mask, **positions).logits[0, -1]
    return differs(alone, beside)


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether logits differ by more than rounding."""
    one, other = one.float(), other.float()
    return bool((one - other).norm() > SHARE * (one - one.mean()).norm())
