"""Writes PEFT's configuration of an adapter, and compares saved adapters with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from tasks.models.targets import Targets, is_linear, matching
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Lora


def lora_config(lora: Lora, found: Targets) -> LoraConfig:
    modules: Any = lora.target_modules if isinstance(lora.target_modules, str) else sorted(set(lora.target_modules))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_plain(lora.lora_alpha),
        lora_dropout=float(lora.lora_dropout),
        target_modules=sorted(found.layers) if found.exact else modules,
        target_parameters=sorted(found.parameters) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={key: _plain(alpha) for key, alpha in lora.alpha_pattern.items()},
        # The others need weights or rows: tasks.training.initial.
        init_lora_weights="gaussian" if lora.init_lora_weights == "gaussian" else True,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def saved_config(config: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Return the configuration as it is saved with an adapter for the unchanged base."""
    saved = lora.as_saved()
    changed = saved.model_dump(include={"r", "lora_alpha", "rank_pattern", "alpha_pattern"})
    return config | {name: value for name, value in changed.items() if value != getattr(lora, name)}


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
    wanted = lora.model_dump(include={"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
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
                raise StageFailed(
                    "bug", f"{name} of the adapter has rank {rank}, expected {' or '.join(map(str, sorted(set(ranks(lora, found)))))}"
                )
            left[part][rank] -= 1


def ranks(lora: Lora, found: Targets) -> Iterator[int]:
    """Yield the rank at each place: PEFT joins the ranks of a tensor's matrices."""
    yield from map(lora.rank_of, found.layers)
    yield from (lora.r * matrices for matrices in found.parameters.values())
