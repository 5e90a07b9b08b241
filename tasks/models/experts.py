"""The experts of a mixture, of which transformers 5 holds a layer's in one tensor: no linear layer that PEFT or GPTQ would find."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def expert_tensors(model: PreTrainedModel) -> dict[str, int]:
    """Tensors that hold a matrix for each expert, by their names, and the number of experts."""
    found = {}
    for name, module in model.named_modules():
        if "Expert" in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if len(shape := shape_of(parameter)) == 3:
                    found[f"{name}.{own}"] = shape[0]
    return found


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Also of one that ZeRO-3 has split."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
