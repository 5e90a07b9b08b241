"""Chooses the weights of a model that get an adapter, and writes PEFT's configuration for them.

`all-linear` means every linear layer except the head, plus the experts of a mixture. transformers 5 holds a layer's experts in one
tensor, which is no layer: there PEFT adapts the tensor (`target_parameters`). PEFT's own `all-linear` (0.21.2,
utils/transformers_weight_conversion.py) knows only some types of mixtures, doubles the rank of fused tensors, and leaves out the layers
of a shared expert, whose names it confuses with the experts'. So tensors are named explicitly here, also for those layers: PEFT uses
names of tensors unchanged.

Left out: routers, and layers whose weight a kernel reads without calling the layer, so that an adapter would not be trained.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tasks.models.experts import expert_tensors, shape_of
from tuneline.errors import StageFailed
from tuneline.kinds.training import Lora

ALL = "all-linear"
WORTH_A_WARNING = 0.01  # share of the weights beside embeddings and head: below it, no warning that `all-linear` leaves some out
READ_BY_KERNELS = ("out_proj", "x_proj", "dt_proj")  # of Mamba: transformers/models/mamba/modeling_mamba.py


@dataclass(frozen=True)
class Targets:
    layers: frozenset[str]
    """Linear layers, by their full names."""
    parameters: dict[str, int]
    """Tensors that are adapted without their layer, and how many matrices each holds."""
    exact: bool
    """Whether PEFT needs the full names, because the stage's names would match more."""

    def others(self) -> list[str]:
        """Return the names of layers of which no tensor is adapted."""
        return [name for name in leaves(self.layers) if not matching(set(self.parameters), (name,))]


def adapted(model: PreTrainedModel, lora: Lora, quantized: bool = False) -> Targets:
    """Resolve `lora.target_modules` in this model: names are matched by their ends, as in PEFT.

    The head is never a target: TRL computes the loss directly from its weight, so an adapter on it would not be trained. Raises
    StageFailed(config) for names that the model does not have, and for settings that PEFT does not support for tensors.
    """
    head, experts = model.get_output_embeddings(), expert_tensors(model)
    linear = {name for name, module in model.named_modules() if is_linear(module) and module is not head}
    alone = {name for name in linear if left_alone(model, name)}
    chosen = named((linear - alone) | experts.keys(), lora.target_modules)
    mistaken = tuple(name for name in leaves(chosen & linear) if experts and taken_for_experts(model, name))
    as_tensors = {f"{name}.weight": 1 for name in sorted(matching(chosen & linear, mistaken))}
    parameters = as_tensors | {name: experts[name] for name in sorted(chosen & experts.keys())}
    layers = frozenset(name for name in chosen & linear if f"{name}.weight" not in parameters)
    found = Targets(layers, parameters, exact=bool(parameters) or bool(matching(alone, lora.target_modules)))
    check_settings(found, lora, quantized)
    if quantized and (read := sorted(name for name in alone if name.endswith(READ_BY_KERNELS))):
        message = f"method: found qlora for a model whose kernels read weights directly, which bitsandbytes would pack: {read[0]}"
        raise StageFailed("config", message, "set `method: lora`")
    return found


def warnings(model: PreTrainedModel, found: Targets, lora: Lora, quantized: bool = False) -> Iterator[str]:
    """Yield warnings about settings that work, but not as a user may expect."""
    if lora.target_modules == ALL and (missing := left_out(model, found)):
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


def named(known: set[str], target_modules: tuple[str, ...] | str) -> set[str]:
    if unknown := [target for target in target_modules if target_modules != ALL and not matching(known, (target,))]:
        names = leaves(known)
        near = [match for target in unknown for match in difflib.get_close_matches(target, names, 1)]
        raise StageFailed(
            "config",
            f"lora.target_modules: found {', '.join(unknown)}, expected {ALL} or some of {', '.join(names)}",
            f"did you mean {', '.join(near)}?" if near else "these are the linear layers of this base model, except its head",
        )
    return matching(known, target_modules)


def matching(known: set[str], target_modules: tuple[str, ...] | str) -> set[str]:
    return {name for name in known if target_modules == ALL or any(f".{name}".endswith(f".{target}") for target in target_modules)}


def leaves(names: set[str] | frozenset[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def check_settings(found: Targets, lora: Lora, quantized: bool) -> None:
    unsuited = [
        ("lora.use_dora: found DoRA", "remove it", lora.use_dora),
        (f"lora.lora_dropout: found {lora.lora_dropout:g}", "remove it", lora.lora_dropout > 0),
        ("method: found qlora", "set `method: lora`", quantized),
    ]
    for problem, remedy, given in unsuited:
        if given and found.parameters:
            first = max(found.parameters, key=lambda name: found.parameters[name])
            rest = f", or adapt only the other layers: `target_modules: [{', '.join(others)}]`" if (others := found.others()) else ""
            message = f"{problem}, which PEFT does not support for experts in one tensor, such as {first}"
            raise StageFailed("config", message, remedy + rest)


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


# --- PEFT -------------------------------------------------------------------------------------------------------------


def lora_config(lora: Lora, found: Targets) -> LoraConfig:
    modules: Any = lora.target_modules if isinstance(lora.target_modules, str) else sorted(set(lora.target_modules))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_plain(lora.lora_alpha),
        lora_dropout=float(lora.lora_dropout),
        target_modules=sorted(found.layers) if found.exact else modules,
        target_parameters=sorted(found.parameters) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _plain(number: float) -> int | float:
    """Return 32 for 32.0, so that equal configurations are written as equal bytes."""
    return int(number) if float(number).is_integer() else number


def meant_by(config: LoraConfig, model: PreTrainedModel) -> set[str]:
    """Return the layers and tensors of a model that a saved adapter's configuration matches."""
    linear = {name for name, module in model.named_modules() if is_linear(module)}
    tensors = {name for name, _ in model.named_parameters()}
    return matching(linear, tuple(config.target_modules)) | matching(tensors, tuple(config.target_parameters or ()))


def check_form(config: dict[str, Any], tensors: dict[str, torch.Tensor], lora: Lora, found: Targets) -> None:
    """Raises StageFailed(bug) unless an adapter has the configured settings, number of tensors and ranks."""
    wanted = lora.model_dump(include={"r", "lora_alpha", "use_rslora", "use_dora"}) | {"rank_pattern": {}, "alpha_pattern": {}}
    for name, value in wanted.items():
        if config[name] != value:
            raise StageFailed("bug", f"the adapter has {name} {config[name]}, expected {value}")
    expected = len(found.layers) * (3 if lora.use_dora else 2) + len(found.parameters) * 2
    if len(tensors) != expected:
        places = len(found.layers) + len(found.parameters)
        raise StageFailed("bug", f"the adapter has {len(tensors)} tensors, expected {expected} for {places} layers")
    left = {part: Counter(ranks(lora, found)) for part in ("lora_A", "lora_B")}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if part in left:
            rank = tensor.shape[0 if part == "lora_A" else 1]
            if not left[part][rank]:
                raise StageFailed("bug", f"{name} of the adapter has rank {rank}, expected {lora.r}")
            left[part][rank] -= 1


def ranks(lora: Lora, found: Targets) -> Iterator[int]:
    """Yield the rank at each place: PEFT joins the ranks of a tensor's matrices."""
    yield from (lora.r for _ in found.layers)
    yield from (lora.r * matrices for matrices in found.parameters.values())
