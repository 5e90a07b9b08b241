"""What of a model gets an adapter: linear layers, and the experts of mixtures, which are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_table import COMMON, TYPES, Trial
from peft import LoraConfig, PeftModel
from program_tools import make_request, run_program, run_until
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.models import adapters, targets
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Lora
from tuneline.workspace.protocol import Input, Request

SFT: dict[str, Any] = {"kind": "sft", "model": "base", "dataset": "data", "max_steps": 4, "global_batch_size": 4, "learning_rate": 1e-2}
LORA = {"r": 4, "lora_alpha": 8}


def model(model_type: str, **fields: Any) -> Any:
    """Without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A dense layer, and one of experts with a shared one."""
    return Trial(tmp_path_factory.mktemp("mixture"), "deepseek_v3")


@pytest.fixture(scope="module")
def trained(mixture: Trial) -> Request:
    return run(mixture, "trained")


def run(mixture: Trial, name: str, **fields: Any) -> Request:
    made = request(mixture, name, **fields)
    run_program(made)
    return made


def request(mixture: Trial, name: str, **fields: Any) -> Request:
    inputs = {"model": mixture.base, "dataset": mixture.data} | fields.pop("inputs", {})
    return make_request(mixture.folder / name, {**SFT, "lora": LORA, **fields}, inputs)


def weights(request: Request) -> dict[str, torch.Tensor]:
    return load_file(request.payload / "adapter_model.safetensors")


def test_all_linear_trains_every_linear_layer_and_the_experts(mixture: Trial, trained: Request) -> None:
    base = AutoModelForCausalLM.from_pretrained(mixture.base.path)
    linear = {name for name, module in base.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"}
    assert {name for name in linear if "shared_experts" in name or "layers.0.mlp" in name}  # names that PEFT takes for experts'
    experts = "model.layers.1.mlp.experts"
    places = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in weights(trained)}
    assert places == {*linear, experts, f"{experts}.base_layer"}
    assert all(tensor.any() for tensor in weights(trained).values())  # lora_B begins with zeros
    config = json.loads((trained.payload / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})
    assert weights(trained)[f"base_model.model.{experts}.lora_A.weight"].shape == (4 * 4, 64)  # rank of 4 for each of 4 experts

    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, trained.payload)(ids).logits  # as anyone reads it
    assert not torch.allclose(before, after, atol=1e-3)


def test_it_goes_on_from_an_adapter_of_experts(mixture: Trial, trained: Request) -> None:
    adapter = Input(path=trained.payload, digest="a" * 64, type="Adapter", template=mixture.base.template, base=mixture.base)
    longer = run(mixture, "longer", inputs={"adapter": adapter})
    assert weights(longer).keys() == weights(trained).keys()
    with pytest.raises(StageFailed, match="found target_modules that match 18 layers instead of 2"):
        run(mixture, "other", inputs={"adapter": adapter}, lora={**LORA, "target_modules": ["o_proj"]})


def test_a_killed_training_of_experts_ends_as_an_undisturbed_one(mixture: Trial, trained: Request) -> None:
    killed = request(mixture, "killed", resources={"checkpoint_steps": 1})
    run_until(killed, 3)
    run_program(killed)
    assert all(torch.equal(tensor, weights(trained)[name]) for name, tensor in weights(killed).items())


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        (
            {"lora": {**LORA, "use_dora": True}},
            "lora.use_dora: found DoRA, which PEFT does not support for experts",
            "remove it, or adapt only the other",
        ),
        (
            {"lora": {**LORA, "lora_dropout": 0.1}},
            "lora.lora_dropout: found 0.1, which PEFT does not support for experts",
            "target_modules: [kv_a_proj",
        ),
        ({"method": "qlora"}, "method: found qlora, which PEFT does not support for experts", "set `method: lora`"),
        (
            {"lora": {**LORA, "target_modules": ["gate_up_pro"]}},
            "lora.target_modules: found gate_up_pro, expected all-linear or some of",
            "did you mean gate_up_proj?",
        ),
    ],
)
def test_what_experts_have_not_is_refused_beforehand(
    mixture: Trial, tmp_path: Path, fields: dict[str, Any], message: str, hint: str
) -> None:
    made = make_request(tmp_path, {**SFT, "lora": LORA, **fields}, {"model": mixture.base, "dataset": mixture.data})
    with pytest.raises(StageFailed, match=message) as failure:
        run_program(made)
    assert failure.value.failure_class == "config"
    assert hint in failure.value.hint
    assert not (made.work / "events.jsonl").exists()


def test_what_the_hint_says_works(mixture: Trial) -> None:
    base = AutoModelForCausalLM.from_pretrained(mixture.base.path)
    with pytest.raises(StageFailed) as failure:
        targets.adapted(base, Lora(use_dora=True))
    names = failure.value.hint.partition("[")[2].partition("]")[0].split(", ")
    found = targets.adapted(base, Lora(use_dora=True, target_modules=tuple(names)))
    assert not found.parameters
    assert len(found.layers) == 10


def test_the_adapters_form_is_looked_at_before_the_first_step(mixture: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapters.configuration
    monkeypatch.setattr(adapters, "configuration", lambda lora, *others: real(lora.model_copy(update={"r": 2}), *others))
    made = request(mixture, "other-rank")
    with pytest.raises(StageFailed, match="the adapter has r 2, expected 4"):
        run_program(made)
    assert not (made.work / "events.jsonl").exists()


def test_what_kernels_read_themselves_is_left_out_and_told() -> None:
    mamba = model("mamba", num_hidden_layers=1, hidden_size=64)
    found = targets.adapted(mamba, Lora())
    assert found.layers == {"backbone.layers.0.mixer.in_proj"}
    (warning,) = targets.warnings(mamba, found, Lora())
    assert "all-linear leaves 4" in warning
    assert "out_proj" in warning
    with pytest.raises(StageFailed, match="found out_proj, expected all-linear or some of in_proj"):
        targets.adapted(mamba, Lora(target_modules=("out_proj",)))


def test_what_kernels_read_themselves_is_not_held_in_few_bits() -> None:
    mamba = model("mamba", num_hidden_layers=1, hidden_size=64)
    with pytest.raises(StageFailed, match="method: found qlora for a model whose kernels read weights directly"):
        targets.adapted(mamba, Lora(), quantized=True)


def test_routers_are_left_alone() -> None:
    fields = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixture = model("phimoe", **fields, num_local_experts=4)  # its router is a linear layer, but gives two tensors
    found = targets.adapted(mixture, Lora())
    assert not [name for name in found.layers if "router" in name]
    assert {name.rpartition(".")[2] for name in found.parameters} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("model_type", "attention", "mlp"),
    [
        ("gpt2", {"c_attn", "attn.c_proj"}, {"c_fc", "mlp.c_proj"}),  # Conv1D, one layer for queries, keys and values
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),  # no module around the second part
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj", "experts.gate_up_proj"}),
        ("bamba", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),  # its in_proj is neither
    ],
)  # fmt: skip
def test_presets_select_the_parts_of_a_layer(model_type: str, attention: set[str], mlp: set[str]) -> None:
    made = model(model_type, **COMMON | TYPES[model_type])
    for preset, wanted in (("attention", attention), ("mlp", mlp), ("attention+mlp", attention | mlp)):
        found = targets.adapted(made, Lora(target_modules=preset))
        names = {name.removesuffix(".weight") for name in found.layers | found.parameters.keys()}
        assert all(any(name.endswith(f".{end}") for end in wanted) for name in names)
        assert all(any(name.endswith(f".{end}") for name in names) for end in wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": r"model\.layers\..*\.qkv"}, r"lora: found target_modules: .*, which matches no layer"),
        ({"target_modules": "attention", "exclude_modules": ("c_attn", "c_proj")}, "which matches no layer"),
        ({"layers_to_transform": (2,)}, "lora.layers_to_transform: found 2, expected numbers from 0 to 1"),
        ({"exclude_modules": ("c_atn",)}, "lora.exclude_modules: found c_atn, expected some of c_attn"),
        ({"rank_pattern": {"q_proj": 4}}, "lora.rank_pattern: found q_proj, which matches no layer with an adapter"),
    ],
)
def test_settings_that_match_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StageFailed, match=message) as failure:
        targets.adapted(model("gpt2", **COMMON), Lora(**fields))
    assert failure.value.hint


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "v_proj")])
def test_older_settings_give_the_configuration_that_they_gave(modules: Any) -> None:
    made = model("llama", **COMMON | TYPES["llama"])
    lora = Lora(r=8, target_modules=modules, use_dora=True)
    written = adapters.saved_config(adapters.configuration(lora, targets.adapted(made, lora)).to_dict(), lora)
    wanted = modules if isinstance(modules, str) else list(modules)
    assert written == LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=wanted, use_dora=True).to_dict()
