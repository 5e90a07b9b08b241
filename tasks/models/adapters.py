"""Writes PEFT's configuration of an adapter, and compares saved adapters with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from transformers import PreTrainedModel

from tasks.models.targets import Targets, is_linear, matching
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Lora, Places, matches
from tuneline.kinds.other_adapters import AdaLora, Ia3, Oft, Vera


def configuration(settings: Places, found: Targets, steps: int | None = None) -> PeftConfig:
    """Return PEFT's configuration. `steps`: those of the whole training, which AdaLoRA needs."""
    modules: Any = settings.target_modules if isinstance(settings.target_modules, str) else sorted(set(settings.target_modules))
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(found.layers) if found.exact else modules,
        "modules_to_save": list(found.modules) or None,
    }
    if isinstance(settings, Lora):
        return LoraConfig(
            **common,
            target_parameters=sorted(found.parameters) or None,
            lora_dropout=float(settings.lora_dropout),
            **fixed(settings),
            ensure_weight_tying=bool(found.tied),
            trainable_token_indices={name: list(numbers) for name, numbers in found.tokens.items()} or None,
            # The others need weights or rows: tasks.training.initial.
            init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
        )
    if isinstance(settings, AdaLora):
        # PEFT adds its penalty to a loss that TRL does not use: tasks.training.rank_allocation.
        return AdaLoraConfig(**common, lora_dropout=float(settings.lora_dropout), **fixed(settings), total_step=steps, orth_reg_weight=0)
    if isinstance(settings, Vera):
        return VeraConfig(**common, vera_dropout=settings.vera_dropout, **fixed(settings))
    if isinstance(settings, Oft):
        return OFTConfig(**common, module_dropout=settings.module_dropout, **fixed(settings))
    assert isinstance(settings, Ia3)
    scaled = sorted(name for name in found.layers if matches(name, settings.feedforward_modules))
    names = [name for name in settings.feedforward_modules if matching(set(scaled), (name,))]
    return IA3Config(**common, feedforward_modules=scaled if found.exact else names)


def fixed(settings: Places) -> dict[str, Any]:
    """Return the settings beside places and dropout, by PEFT's names: an adapter keeps them when it is trained further."""
    names = {
        "lora": {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"},
        "adalora": {"init_r", "target_r", "lora_alpha", "tinit", "tfinal", "deltaT", "beta1", "beta2"},
        "vera": {"r", "d_initial", "projection_prng_key", "save_projection"},
        "oft": {"oft_block_size", "coft", "eps", "use_cayley_neumann"},
        "ia3": set[str](),
    }[settings.kind]
    return {name: _plain(value) for name, value in settings.model_dump(include=names).items()}


def compared(config: PeftConfig, settings: Places) -> dict[str, Any]:
    """Return what must be the same in a configuration for an adapter to be trained further."""
    names = [*fixed(settings), "modules_to_save", "ensure_weight_tying", "trainable_token_indices", "feedforward_modules", "peft_type"]
    return {name: getattr(config, name, None) for name in names}


def saved_config(config: dict[str, Any], settings: Places) -> dict[str, Any]:
    """Return the configuration as it is saved with an adapter for the unchanged base."""
    before, after = fixed(settings), fixed(settings.as_saved())
    return config | {name: value for name, value in after.items() if value != before[name]}


def _plain(value: Any) -> Any:
    """Return 32 for 32.0, also in patterns, so that equal configurations are written as equal bytes."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def meant_by(config: PeftConfig, model: PreTrainedModel) -> set[str]:
    """Return the layers and tensors of a model that a saved adapter's configuration matches."""
    linear = {name for name, module in model.named_modules() if is_linear(module)}
    tensors = {name for name, _ in model.named_parameters()}
    parameters = getattr(config, "target_parameters", None) or ()
    return matching(linear, tuple(config.target_modules)) | matching(tensors, tuple(parameters))


PARTS = {"lora": ".lora_", "adalora": ".lora_", "vera": "vera_", "oft": ".oft_", "ia3": ".ia3_"}  # in the names of an adapter's tensors


def check_form(config: dict[str, Any], tensors: dict[str, torch.Tensor], settings: Places, found: Targets) -> None:
    """Raises StageFailed(bug) unless an adapter has the configured settings, number of tensors and ranks."""
    for name, value in fixed(settings).items():
        if config[name] != value:
            raise StageFailed("bug", f"the adapter has {name} {config[name]}, expected {value}")
    own = [name for name in tensors if PARTS[settings.kind] in name]
    expected = len(found.layers) * tensors_of_a_layer(settings) + len(found.parameters) * 2
    if isinstance(settings, Vera) and settings.save_projection:
        expected += 2
    if len(own) != expected:
        places = len(found.layers) + len(found.parameters)
        raise StageFailed("bug", f"the adapter has {len(own)} tensors, expected {expected} for {places} layers")
    check_whole([name for name in tensors if name not in own], found)
    if isinstance(settings, Lora):
        check_ranks(tensors, settings, found)


def tensors_of_a_layer(settings: Places) -> int:
    if isinstance(settings, Lora):
        return 3 if settings.use_dora else 2
    if isinstance(settings, AdaLora):
        return 3
    return 2 if isinstance(settings, Vera) else 1


def check_ranks(tensors: dict[str, torch.Tensor], lora: Lora, found: Targets) -> None:
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


def check_whole(tensors: list[str], found: Targets) -> None:
    """Raises StageFailed(bug) unless the tensors beside the layers' are those of the modules and tokens that are trained whole."""
    places = [f"base_model.model.{name}." for name in (*found.modules, *found.tokens, found.tied) if name]
    strange = [name for name in tensors if not name.startswith(tuple(places))]
    missing = [place for place in places if not any(name.startswith(place) for name in tensors)]
    if strange or missing:
        listed = f"found {', '.join(sorted(tensors)) or 'nothing'}, expected {', '.join(places) or 'nothing'}"
        raise StageFailed("bug", f"the adapter's tensors beside the layers': {listed}")


def ranks(lora: Lora, found: Targets) -> Iterator[int]:
    """Yield the rank at each place: PEFT joins the ranks of a tensor's matrices."""
    yield from map(lora.rank_of, found.layers)
    yield from (lora.r * matrices for matrices in found.parameters.values())
