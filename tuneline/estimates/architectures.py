"""Read a model's architecture from its `config.json` alone: its parameters, and the linear layers that an adapter can target.

Supports decoders of one structure: `q_proj`, `k_proj`, `v_proj`, `o_proj`, a gated MLP, RMS norms. `tests/program/test_estimates.py`
compares every type with transformers' own model. Other types have no estimate: a wrong one is worse than none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Lora, Places
from tuneline.kinds.model import ModelStage
from tuneline.kinds.stage import Stage
from tuneline.paths import resolve_path
from tuneline.planning.plan import PlanRow
from tuneline.workspace.workspace import Workspace

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Family:
    """Differences of a model type from Llama, and its defaults for fields that its config.json may omit."""

    norms: int = 2
    """Norms per layer, each over the hidden size."""
    head_norms: bool = False
    """Whether queries and keys of each head are normalized as well."""
    qkv_bias: bool = False
    tied: bool = False
    head_dim: int | None = None
    """Head dimension, if it is not the hidden size divided by the heads."""
    windows: bool = False
    """Whether models of the type may use sliding-window attention in some layers."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(windows=True),
    "granite": Family(),
    "smollm3": Family(tied=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True, head_dim=128),
    "gemma": Family(tied=True, head_dim=256),
    "gemma3_text": Family(norms=4, head_norms=True, tied=True, head_dim=256, windows=True),
}


@dataclass(frozen=True)
class Architecture:
    """An architecture. Fields are named as in `config.json` where it has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    family: Family
    dtype: str | None
    """Data type of the weights in the model's files."""
    positions: float
    """Maximum sequence length in tokens, from `reach`."""

    @property
    def sharing(self) -> list[int]:
        """Numbers of processes that can share a sequence by exchanging tokens for heads: `tasks.training.sequences`."""
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        return [n for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0)]

    @property
    def queries(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: (input size, output size) by name."""
        h, i = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (h, self.queries),
            "self_attn.k_proj": (h, self.keys),
            "self_attn.v_proj": (h, self.keys),
            "self_attn.o_proj": (self.queries, h),
            "mlp.gate_proj": (h, i),
            "mlp.up_proj": (h, i),
            "mlp.down_proj": (i, h),
        }

    @property
    def linear_parameters(self) -> int:
        """Number of weights of all linear layers except the head; QLoRA quantizes these."""
        return self.num_hidden_layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def layer_parameters(self) -> int:
        biases = 0
        for name, (_, outputs) in self.linear.items():
            biased = self.mlp_bias if name.startswith("mlp") else self.attention_bias or (self.family.qkv_bias and "o_proj" not in name)
            biases += outputs if biased else 0
        norms = self.family.norms * self.hidden_size + (2 * self.head_dim if self.family.head_norms else 0)
        return self.linear_parameters // self.num_hidden_layers + biases + norms

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    def targeted(self, places: Places) -> dict[str, list[str]]:
        """Return the full names of the layers that get an adapter, by their name in a decoder layer, as in `tasks.models.targets`."""
        return _targeted(self.num_hidden_layers, tuple(self.linear), places.model_dump_json(include=set(Places.model_fields)))

    def adapter_parameters(self, settings: Places) -> int:
        """Return the trained parameters of an adapter."""
        return _parameters(self, type(settings), settings.model_dump_json())


@lru_cache
def _parameters(architecture: Architecture, kind: type[Places], document: str) -> int:
    settings = kind.model_validate_json(document)
    targeted = ((layer, architecture.linear[name]) for name, layers in architecture.targeted(settings).items() for layer in layers)
    return sum(settings.parameters(layer, *sizes) for layer, sizes in targeted)


@lru_cache
def _targeted(layers: int, linear: tuple[str, ...], places: str) -> dict[str, list[str]]:
    wanted, found = Lora.model_validate_json(places), {}  # any kind: they select layers alike
    for name in linear:
        part = "attention" if name.startswith("self_attn") else "mlp"
        full = (f"model.layers.{i}.{name}" for i in range(layers))
        found[name] = [layer for layer in full if wanted.selects(layer, part)]
    return {name: chosen for name, chosen in found.items() if chosen}


# --- where it is read -------------------------------------------------------------------------------------------------


def architecture_of(workspace: Workspace, stages: Mapping[str, Stage], rows: Mapping[str, PlanRow], name: str) -> Architecture | str:
    """Return the architecture that the stage `name` uses, or a text why it is unknown. Reads no weights."""
    stage = stages[name]
    while name_before := stage.made_from():  # they change weights, never the architecture
        name, stage = name_before, stages[name_before]
    assert isinstance(stage, ModelStage)  # all models come from one
    artifact = rows[name].artifact
    try:
        if stage.path is not None:
            return read((resolve_path(workspace.root, stage.path) / "config.json").read_bytes())
        if artifact is not None:
            return read((artifact.payload / "config.json").read_bytes())
        if stage.gguf is not None or stage.hub is None:
            return f"{name} has not been converted yet"
        if rows[name].problems:
            return rows[name].problems[0].message
        config = workspace.hub.config(stage.hub, stage.revision)
        return read(config) if config else f"{name} has not been fetched yet; `--online` asks the hub"
    except StageFailed as error:
        return error.message
    except (OSError, ValueError) as error:
        return f"the config.json of {name} cannot be read: {getattr(error, 'strerror', None) or error}"


@lru_cache
def read(text: bytes) -> Architecture | str:
    """Read a `config.json`; return the architecture, or why it is not supported. Raises ValueError if it is not valid."""
    config: dict[str, Any] = json.loads(text)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        return f"models of type `{model_type}` are not supported, only {', '.join(FAMILIES)}"
    if "quantization_config" in config:
        return "its weights are quantized"
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        return f"its config.json has no {', '.join(missing)}"
    family, heads = FAMILIES[model_type], config["num_attention_heads"]
    return Architecture(
        **{name: config[name] for name in needed},
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.head_dim or config["hidden_size"] // heads,
        tie_word_embeddings=config.get("tie_word_embeddings", family.tied),
        attention_bias=bool(config.get("attention_bias")) and model_type not in ("mistral", "qwen2"),
        mlp_bias=bool(config.get("mlp_bias")) and model_type in ("llama", "granite", "smollm3"),
        family=family,
        dtype=config.get("dtype") or config.get("torch_dtype"),
        positions=reach(config),
    )


def reach(config: Mapping[str, Any]) -> float:
    """Return the maximum sequence length in tokens; infinite if config.json has none, because some models have no limit.

    RoPE scaling extends it. Some models write the extended number (Llama 3, Phi 3), others the original one (Qwen's YaRN), so the
    larger one applies.
    """
    written = config.get("max_position_embeddings") or config.get("n_positions") or math.inf
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}  # names in transformers 5, and before
    return max(written, (scaling.get("original_max_position_embeddings") or written) * (scaling.get("factor") or 1))
