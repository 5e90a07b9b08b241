"""Finds a mixture's experts: transformers 5 holds a layer's in one tensor, which PEFT and GPTQ do not see as a linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def expert_tensors(model: PreTrainedModel) -> dict[str, int]:
    """Map the name of each tensor that holds one matrix per expert to its number of experts."""
    found = {}
    for name, module in model.named_modules():
        if "Expert" in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if len(shape := shape_of(parameter)) == 3:
                    found[f"{name}.{own}"] = shape[0]
    return found


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return a parameter's full shape, also where ZeRO-3 has split it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
