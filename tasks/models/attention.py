"""Chooses the implementation of a model's attention. It changes speed, memory and rounding, so it is in no key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuneline.errors import StageFailed
from tuneline.kinds.stage import ComputingStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST_FLASH_HEAD = 256  # github.com/Dao-AILab/flash-attention, README


def set_attention(model: PreTrainedModel, stage: ComputingStage) -> None:
    """Give the model the stage's attention. `auto` prefers flash attention where package, GPU, dtype and model suit, and else keeps
    transformers' choice. Raises StageFailed(config) if the stage names one that the runtime or the model lacks."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    flash = {  # the latter is written for Hopper
        "flash_attention_3": is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == 9,
        "flash_attention_2": is_flash_attn_2_available(),
    }
    named: str = stage.resources.attn_implementation
    if named == "auto":
        width = getattr(model.config.get_text_config(), "head_dim", None) or 0
        suits = stage.resources.gpus and stage.dtype == "bfloat16" and model._supports_flash_attn and width <= WIDEST_FLASH_HEAD
        named = next((name for name, usable in flash.items() if usable), named) if suits else named
    elif not flash.get(named, True):
        found = f"resources.attn_implementation: found {named}, which this runtime or GPU lacks"
        raise StageFailed("config", found, "add the package to the runtime's lock, or set `attn_implementation: auto`")
    if named == "auto":
        return
    try:
        model.set_attn_implementation(named)
    except (ImportError, ValueError) as error:
        message = f"resources.attn_implementation: {model.config.model_type} cannot use {named}: {error}"
        raise StageFailed("config", message, "set `attn_implementation: auto`") from error
