"""Chooses the weights of a model that get an adapter.

`all-linear` means every linear layer except the head, plus the experts of a mixture. transformers 5 holds a layer's experts in one
tensor, which is no layer: there PEFT adapts the tensor (`target_parameters`). PEFT's own `all-linear` (0.21.2,
utils/transformers_weight_conversion.py) knows only some types of mixtures, doubles the rank of fused tensors, and leaves out the layers
of a shared expert, whose names it confuses with the experts'. So tensors are named explicitly here, also for those layers: PEFT uses
names of tensors unchanged.

Left out: routers, and layers whose weight a kernel reads without calling the layer, so that an adapter would not be trained.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.models.experts import expert_tensors, shape_of
from tasks.models.whole import leaves, saved_modules
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import ALL, PRESETS, Lora, Places, at_end, matches
from tuneline.kinds.other_adapters import Oft

WORTH_A_WARNING = 0.01  # share of the weights beside embeddings and head: below it, no warning that `all-linear` leaves some out
ATTENTION = re.compile(r"\w*Attention\w{0,2}")
FEED_FORWARD = re.compile(r"\w*(MLP|Mlp|FeedForward|FFN|Experts|Mo[eE]|Mo[eE]Block)")
FEED_FORWARD_LAYERS = ("fc1", "fc2", "ffn.0", "ffn.2")  # OPT, BioGPT and XGLM have them without a module around them, CTRL in a list
READ_BY_KERNELS = ("out_proj", "x_proj", "dt_proj")  # of Mamba: transformers/models/mamba/modeling_mamba.py


@dataclass(frozen=True)
class Targets:
    layers: frozenset[str]
    """Linear layers, by their full names."""
    parameters: dict[str, int]
    """Tensors that are adapted without their layer, and how many matrices each holds."""
    exact: bool
    """Whether PEFT needs the full names, because the stage's names would match more."""
    modules: tuple[str, ...] = ()
    """Modules that are trained whole, by their full names."""
    tied: str = ""
    """The head, if it is tied to an embedding among them."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Numbers of added tokens, by the embedding or head of which their rows are trained."""

    def others(self) -> list[str]:
        """Return the names of layers of which no tensor is adapted."""
        return [name for name in leaves(self.layers) if not matching(set(self.parameters), (name,))]


def adapted(model: PreTrainedModel, settings: Places, quantized: bool = False) -> Targets:
    """Resolve `target_modules` and the fields that narrow it in this model.

    The head is never a target: TRL computes the loss directly from its weight, so an adapter on it would not be trained. Raises
    StageFailed(config) for settings that match nothing, and for those that PEFT does not support for tensors.
    """
    head, experts = model.get_output_embeddings(), expert_tensors(model)
    linear = {name for name, module in model.named_modules() if is_linear(module) and module is not head}
    alone = {name for name in linear if left_alone(model, name)}
    chosen = selected(model, (linear - alone) | experts.keys(), settings)
    mistaken = tuple(name for name in leaves(chosen & linear) if experts and taken_for_experts(model, name))
    as_tensors = {f"{name}.weight": 1 for name in sorted(matching(chosen & linear, mistaken))}
    parameters = as_tensors | {name: experts[name] for name in sorted(chosen & experts.keys())}
    layers = frozenset(name for name in chosen & linear if f"{name}.weight" not in parameters)
    names = not settings.by_name() or bool(matching(alone, settings.target_modules))
    whole, tied = saved_modules(model, chosen, settings)
    found = Targets(layers, parameters, bool(parameters) or names, whole, tied)
    check_settings(found, settings, quantized)
    check_sizes(model, found, settings)
    if isinstance(settings, Lora):
        check_patterns(found, settings)
    if quantized and (read := sorted(name for name in alone if name.endswith(READ_BY_KERNELS))):
        message = f"method: found qlora for a model whose kernels read weights directly, which bitsandbytes would pack: {read[0]}"
        raise StageFailed("config", message, "set `method: lora`")
    return found


def warnings(model: PreTrainedModel, found: Targets, settings: Places, quantized: bool = False) -> Iterator[str]:
    """Yield warnings about settings that work, but not as a user may expect."""
    if settings.target_modules == ALL and settings.by_name() and (missing := left_out(model, found)):
        yield missing
    if quantized and (experts := expert_tensors(model)):
        yield f"bitsandbytes packs linear layers only: {min(experts)} and the other experts stay unpacked"


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


def left_alone(model: PreTrainedModel, name: str) -> bool:
    """Return whether a layer is never adapted: routers, some of which return several tensors, and weights that Mamba's kernels read."""
    parent, _, own = name.rpartition(".")
    mixer = model.get_submodule(parent)
    return "Router" in type(model.get_submodule(name)).__name__ or (
        own in READ_BY_KERNELS and hasattr(mixer, "A_log") and hasattr(mixer, "D")
    )


def taken_for_experts(model: PreTrainedModel, name: str) -> bool:
    """Return whether PEFT would convert a layer's name into a name of experts."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # the name is one half of a fused tensor
        return True
    return name not in config.target_modules


def selected(model: PreTrainedModel, known: set[str], places: Places) -> set[str]:
    """Return those of the known names that the fields select. Raises StageFailed(config) for a field that matches nothing."""
    named = places.target_modules if isinstance(places.target_modules, tuple) else ()
    excluded = places.exclude_modules if isinstance(places.exclude_modules, tuple) else ()
    for where, names in (("target_modules", named), ("exclude_modules", excluded)):
        if unknown := [name for name in names if not matching(known, (name,))]:
            there = leaves(known)
            near = [match for name in unknown for match in difflib.get_close_matches(name, there, 1)]
            raise StageFailed(
                "config",
                f"{places.kind}.{where}: found {', '.join(unknown)}, expected {f'{ALL} or ' if where == 'target_modules' else ''}"
                f"some of {', '.join(there)}",
                f"did you mean {', '.join(near)}?" if near else "these are the linear layers of this base model, except its head",
            )
    layers = {int(number[1]) for name in known if (number := re.search(r"\.(\d+)\.", name))}
    if beyond := sorted(set(places.layers_to_transform or ()) - layers):
        message = (
            f"{places.kind}.layers_to_transform: found {', '.join(map(str, beyond))}, expected numbers from {min(layers)} to {max(layers)}"
        )
        raise StageFailed("config", message, "layers are counted from 0")
    found = {name for name in known if places.selects(name, part_of(model, name))}
    if not found:
        given = {name: getattr(places, name) for name in Places.model_fields if name in places.model_fields_set}
        matched = " with ".join(f"{name}: {value}" for name, value in given.items())
        hint = f"the layers are {', '.join(leaves(known))}; a full name is, for example, {min(known)}"
        raise StageFailed("config", f"{places.kind}: found {matched}, which matches no layer of this base model", hint)
    return found


def part_of(model: PreTrainedModel, name: str) -> str:
    """Return the part of a decoder layer that a layer or tensor belongs to, by the class of the module around it."""
    around = type(model.get_submodule(name.rpartition(".")[0])).__name__
    if ATTENTION.fullmatch(around):
        return "attention"
    return "mlp" if FEED_FORWARD.fullmatch(around) or name.endswith(FEED_FORWARD_LAYERS) else ""


def matching(known: set[str], target_modules: tuple[str, ...] | str) -> set[str]:
    return {name for name in known if target_modules == ALL or target_modules in PRESETS or matches(name, target_modules)}


def check_settings(found: Targets, settings: Places, quantized: bool) -> None:
    if isinstance(settings, Lora):
        unsuited = [
            ("lora.use_dora: found DoRA", "remove it", settings.use_dora),
            (f"lora.lora_dropout: found {settings.lora_dropout:g}", "remove it", settings.lora_dropout > 0),
            ("method: found qlora", "set `method: lora`", quantized),
        ]
    else:
        unsuited = [(f"{settings.kind}: found {settings.kind}", "train with `lora:`", True)]
    for problem, remedy, given in unsuited:
        if given and found.parameters:
            first = max(found.parameters, key=lambda name: found.parameters[name])
            rest = f", or adapt only the other layers: `target_modules: [{', '.join(others)}]`" if (others := found.others()) else ""
            message = f"{problem}, which PEFT does not support for experts in one tensor, such as {first}"
            raise StageFailed("config", message, remedy + rest)


def check_sizes(model: PreTrainedModel, found: Targets, settings: Places) -> None:
    """Raises StageFailed(config) for layers that OFT cannot split into blocks, and for GPT-2's, of which the other kinds misread the
    sides: PEFT would change the block size, and takes the inputs of a Conv1D for its outputs."""
    if found.tied and not isinstance(settings, Lora):
        message = f"{settings.kind}.modules_to_save: found embeddings that the head is tied to, which PEFT keeps tied only with LoRA"
        raise StageFailed("config", message, "remove them, or train with `lora:`")
    for name in () if isinstance(settings, Lora) else sorted(found.layers):
        layer = model.get_submodule(name)
        if isinstance(layer, Conv1D):
            message = f"{settings.kind}: found Conv1D layers such as {name}, expected linear layers"
            raise StageFailed("config", message, "train with `lora:`")
        if isinstance(settings, Oft) and layer.in_features % settings.oft_block_size:
            message = (
                f"oft.oft_block_size: found {settings.oft_block_size}, which does not divide {layer.in_features}, the inputs of {name}"
            )
            raise StageFailed("config", message, f"set a divisor, or leave the layer out: `exclude_modules: [{name.rpartition('.')[2]}]`")


def check_patterns(found: Targets, lora: Lora) -> None:
    """Raises StageFailed(config) for a key of rank_pattern or alpha_pattern that matches no adapted layer, and for tensors, whose layers
    PEFT does not match (peft/utils/transformers_weight_conversion.py doubles their ranks by own patterns)."""
    for pattern in ("rank_pattern", "alpha_pattern"):
        keys = getattr(lora, pattern)
        if keys and found.parameters:
            first = min(found.parameters)
            others = ", ".join(found.others())
            message = f"lora.{pattern}: found {', '.join(keys)}, expected none with experts in one tensor, such as {first}"
            raise StageFailed("config", message, f"remove it, or adapt only the other layers: `target_modules: [{others}]`")
        if unknown := [key for key in keys if not any(at_end(key, name) for name in found.layers)]:
            message = f"lora.{pattern}: found {', '.join(unknown)}, which matches no layer with an adapter"
            raise StageFailed("config", message, f"these layers have one: {', '.join(leaves(found.layers))}")


def left_out(model: PreTrainedModel, found: Targets) -> str:
    """Return a warning about weights that `all-linear` leaves without an adapter; empty if they are a negligible share."""
    apart = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    sizes = {
        name: prod(shape_of(p)) for name, p in model.named_parameters() if len(shape_of(p)) > 1 and p is not head and name not in apart
    }
    sizes = {name: size for name, size in sizes.items() if not name.endswith("bias")}
    missing = Counter[str]()
    for name, size in sizes.items():
        if name not in found.parameters and (layer := name.removesuffix(".weight")) not in found.layers:
            missing[layer.rpartition(".")[2]] += size
    if missing.total() < WORTH_A_WARNING * sum(sizes.values()):
        return ""
    first = ", ".join(name for name, _ in missing.most_common(3))
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    share = missing.total() / sum(sizes.values())
    return f"all-linear leaves {share:.0%} of the layers' weights without an adapter ({first}{more}); `method: full` trains all"
