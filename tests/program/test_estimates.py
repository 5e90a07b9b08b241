"""Estimates against what transformers, PEFT and torch do: parameters of every family, and what a forward pass keeps, byte by byte."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tasks.models import adapters, targets
from tuneline.estimates.architectures import FAMILIES, Architecture, read
from tuneline.estimates.memory import Job
from tuneline.kinds.adapters import Lora
from tuneline.kinds.other_adapters import AdaLora, Ia3, Oft, Vera
from tuneline.kinds.sft import SftStage

SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def small_model(model_type: str, folder: Path, **fields: Any) -> tuple[Any, Architecture]:
    config = CONFIG_MAPPING[model_type](**SMALL, **{"num_hidden_layers": 2} | fields)
    config.save_pretrained(folder)
    architecture = read((folder / "config.json").read_bytes())
    assert isinstance(architecture, Architecture), architecture
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config), architecture


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32, "tie_word_embeddings": True}])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_those_of_transformers(model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, architecture = small_model(model_type, tmp_path, **fields)
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_that_a_config_leaves_out_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    """Hub configs were often written by hand, and lack what has the type's default."""
    model, architecture = small_model(model_type, tmp_path)
    config = {"model_type": model_type, **SMALL, "num_hidden_layers": 2}
    (tmp_path / "bare.json").write_text(json.dumps(config))
    assert read((tmp_path / "bare.json").read_bytes()).parameters == architecture.parameters  # type: ignore[union-attr]
    assert architecture.parameters == model.num_parameters()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("self_attn.o_proj", "layers.1.mlp.up_proj")])
def test_an_adapters_parameters_are_those_of_peft(targets: Any, use_dora: bool, tmp_path: Path) -> None:
    model, architecture = small_model("qwen2", tmp_path)
    wanted = targets if isinstance(targets, str) else list(targets)
    trainable, _ = get_peft_model(model, LoraConfig(r=8, target_modules=wanted, use_dora=use_dora)).get_nb_trainable_parameters()
    assert architecture.adapter_parameters(Lora(r=8, target_modules=targets, use_dora=use_dora)) == trainable


@pytest.mark.parametrize(
    "settings",
    [
        Lora(r=8, target_modules="attention", layers_to_transform=(1,), rank_pattern={"q_proj": 4}),
        Lora(r=8, target_modules=r".*\.mlp\..*", exclude_modules=("up_proj",)),
        Vera(r=16),
        AdaLora(init_r=6, target_r=3, target_modules="attention"),
        Oft(oft_block_size=16, target_modules="mlp"),
        Ia3(target_modules="all-linear"),
    ],
    ids=repr,
)
def test_the_parameters_of_every_kind_are_those_of_peft(settings: Any, tmp_path: Path) -> None:
    model, architecture = small_model("qwen2", tmp_path)
    config = adapters.configuration(settings, targets.adapted(model, settings), steps=10)
    trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    assert architecture.adapter_parameters(settings) == trainable


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "lora", {"dtype": "bfloat16"}) for family in FAMILIES),
    *((family, "lora", {"dtype": "float32"}) for family in ("llama", "qwen3")),
    ("llama", "lora", {"dtype": "bfloat16", "resources": {"micro_batch_size": 2}}),
    ("llama", "lora", {"dtype": "float32", "resources": {"micro_batch_size": 2}}),
    ("llama", "lora", {"dtype": "bfloat16", "lora": {"lora_dropout": 0.1}}),
    ("llama", "lora", {"dtype": "float32", "lora": {"lora_dropout": 0.1}}),
    ("llama", "lora", {"dtype": "bfloat16", "lora": {"target_modules": ["q_proj", "v_proj"]}}),
    ("llama", "lora", {"dtype": "float32", "lora": {"target_modules": ["v_proj", "down_proj"], "r": 4}}),
    ("llama", "full", {"dtype": "bfloat16"}),
    ("llama", "full", {"dtype": "float32"}),
    ("qwen3", "full", {"dtype": "bfloat16"}),
    ("qwen3", "full", {"dtype": "float32"}),
    ("llama", "lora", {"dtype": "float32", "lora": {"use_dora": True}}),
]


@pytest.mark.parametrize(("family", "method", "fields"), CASES, ids=str)
def test_a_layer_keeps_as_much_as_torch_keeps_of_it(family: str, method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    resources = {"micro_batch_size": 1, **fields.get("resources", {})}
    stage = SftStage.model_validate_json(json.dumps({"kind": "sft", "model": "b", "dataset": "d", **fields, "resources": resources}))
    length = 128
    kept, architecture = {}, None
    for layers in (1, 2):
        model, architecture = small_model(family, tmp_path / f"{layers}", num_hidden_layers=layers, head_dim=64)
        kept[layers] = kept_bytes(model, stage, method, length)
    assert architecture is not None
    job = Job(architecture, stage, length, method)
    tokens = length * job.rows
    of_weights = (job.compute * (architecture.layer_parameters if method == "full" else job.trainable / 2)) if job.mixed else 0
    assert tokens * job.layer() == pytest.approx(kept[2] - kept[1] - of_weights, rel=0.01)


def kept_bytes(model: Any, stage: SftStage, method: str, length: int) -> int:
    """What autograd holds after the forward pass of a batch, apart from parameters."""
    mixed, lora = stage.dtype == "bfloat16", stage.lora
    if method == "lora":
        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        config = LoraConfig(r=lora.r, lora_dropout=lora.lora_dropout, target_modules=targets, use_dora=lora.use_dora)
        model = get_peft_model(model.to(torch.bfloat16 if mixed else torch.float32), config)
        model.enable_input_require_grads()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: list[weakref.ref[torch.Tensor]] = []  # parts of the graph are thrown away at once: those of a tensor that is then detached

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    ids = torch.randint(1, SMALL["vocab_size"], (stage.micro_batch_size(), length))
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0  # as where a row is shorter
    decoder = model.base_model.model.model if method == "lora" else model.model
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        hidden = decoder(ids, attention_mask=mask)  # holds the graph
    storages = [tensor.untyped_storage() for reference in saved if (tensor := reference()) is not None]
    del hidden
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}.values())
