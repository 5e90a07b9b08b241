"""Finds the layers that GPTQ can quantize, and refuses models that gptqmodel 7.6 handles wrongly, before anything is computed.

Checks the model as transformers builds it, without weights, and the layers that gptqmodel names for its type. gptqmodel splits fused
layers and experts, under names that transformers does not read: such a model would load with random weights in their place.
docs/architectures.md lists what was tried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.convert import quantizer
from tasks.models.experts import expert_tensors
from tasks.models.gptq import quantization
from tasks.models.loading import needs_remote_code, without_weights
from tasks.models.weights import read_header, weight_files
from tuneline.errors import StageFailed
from tuneline.kinds.quantize import QuantizeStage
from tuneline.workspace.protocol import Input
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_SIZES = (16, 32, 64, 128, 256)
PACKED = 32  # widths must be multiples of it: nn_modules/qlinear/__init__.py, pack_block
BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.(?P<layer>.+)")
MISREAD = {  # reasons, found with small random models
    "mpt": "whose masks it inverts",  # it drops a token of each row
    "ctrl": "for which transformers then computes other logits",
    "gemma4_text": "for which transformers then computes other logits",
}
FALLBACK_HINT = "remove the stage: evaluate and serve the model in 16 bits"


@dataclass(frozen=True)
class Quantizable:
    layers: dict[str, tuple[int, int]]
    """(outputs, inputs) of each linear layer inside the model's blocks, by its name in transformers."""
    prefix: str
    """The beginning of names that the model's files omit."""


def quantizable(source: Input, stage: QuantizeStage) -> Quantizable:
    """Return the layers to quantize. Raises StageFailed(config) if this stage cannot quantize the model."""
    if needs_remote_code(source):
        hint = "quantize a model of an architecture that transformers supports"
        raise StageFailed("config", "the model runs its own code (trust_remote_code), whose layers gptqmodel does not know", hint)
    folder = model_folder(source.path)
    if (settings := quantization(folder)) is not None:
        hint = "quantize the model in full precision that it was made from"
        raise StageFailed("config", f"the model is already quantized, by {settings['quant_method']}", hint)
    model = without_weights(folder)
    linear = linear_layers(model)
    layers = {name: (module.weight.shape[0], module.weight.shape[1]) for name, module in linear.items()}
    layers |= {name: (module.nf, module.nx) for name, module in linear.items() if hasattr(module, "nf")}  # Conv1D stores them transposed
    refuse_architecture(model, linear, quantizer.layer_names(folder, model))
    refuse_widths(layers, stage)
    stored = headers(folder)
    prefix = "" if any(f"{name}.weight" in stored for name in layers) else f"{model.base_model_prefix}."
    return Quantizable(layers, prefix)


def linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Return the linear layers inside a numbered block."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and BLOCK.fullmatch(name)
    }


def refuse_architecture(model: PreTrainedModel, linear: dict[str, Any], named: set[str]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    kind, experts = model.config.model_type, expert_tensors(model)
    unusual = [name for name, module in linear.items() if type(module) not in (torch.nn.Linear, Conv1D)]
    left = [name for name in linear if BLOCK.fullmatch(name)["layer"] not in named]  # type: ignore[index]
    if kind in MISREAD:
        problem = f"gptqmodel does not calibrate `{kind}` correctly, {MISREAD[kind]}"
    elif experts:
        problem = f"`{kind}` holds experts in one tensor, {min(experts)}, which transformers does not read in quantized form"
    elif unusual:
        own = type(linear[unusual[0]]).__name__
        problem = f"{unusual[0]} of `{kind}` has its own class, {own}, which transformers does not read in quantized form"
    elif left and len(left) == len(linear):
        problem = f"gptqmodel finds no layers in `{kind}`"
    elif left:
        problem = f"gptqmodel skips or splits {left[0]} of `{kind}`, but transformers would read it as one quantized layer"
    else:
        return
    raise StageFailed("config", problem, FALLBACK_HINT)


def refuse_widths(layers: dict[str, tuple[int, int]], stage: QuantizeStage) -> None:
    widths = {inputs: name for name, (_, inputs) in reversed(layers.items())}
    for width, name in widths.items():
        if stage.group_size > 0 and width % stage.group_size and not width % PACKED:
            allowed = [-1] + [size for size in GROUP_SIZES if all(inputs % size == 0 for inputs in widths)]
            raise StageFailed(
                "config",
                f"group_size: found {stage.group_size}, which does not divide {width}, the width of {name}",
                f"this model allows {', '.join(map(str, allowed))}",
            )
    for name, shape in layers.items():
        if wrong := [width for width in shape if width % PACKED]:
            raise StageFailed("config", f"{name} is {wrong[0]} wide, but GPTQ packs only multiples of {PACKED}", FALLBACK_HINT)


def headers(folder: Path, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return the header of every tensor in a folder's files, by its name in transformers."""
    return {prefix + name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}


def block_count(layers: dict[str, tuple[int, int]]) -> int:
    """Count the blocks: the distinct beginnings of names up to their first number."""
    return len({BLOCK.fullmatch(name)["block"] for name in layers})  # type: ignore[index]
