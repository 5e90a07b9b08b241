"""The merge program on pico models, against PEFT's own merge."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from elsewhere import Elsewhere
from pico import save_pico, tokenizer
from program_tools import make_request, payload_digest, run_program
from transformers import AutoTokenizer

from tasks.convert import merge
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request

torch = pytest.importorskip("torch")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("base"), width=32)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("untied"), width=32, tied=False)


def save_adapter(base: Path, folder: Path, strength: float = 0.1, **options: Any) -> Input:
    """A random adapter of `base`, with the base's tokenizer, as a training would leave it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += strength * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tokenizer().save_pretrained(folder)
    return Input(path=folder, digest="a", type="Adapter", base=Input(path=base, digest="b", type="Model"))


def merge_request(folder: Path, adapter: Input, **options: Any) -> Request:
    return make_request(folder, {"kind": "merge", "adapters": ["sft"], **options}, {"adapters.0": adapter})


def weights_in(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merged_by_peft(adapter: Input) -> dict[str, Any]:
    """Weights by their names on disk, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert adapter.base
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.base.path, dtype=torch.float32), adapter.path)
    return dict(model.merge_and_unload().state_dict())


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_weights(file: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_equals_peft(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(merge, "BLOCK", 5 * 4 * 32)  # five rows at a time: 32 and 64 are no multiples
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    request = merge_request(tmp_path, adapter)
    result, events = run_program(request)
    found, expected, before = weights_in(request.payload), merged_by_peft(adapter), weights_in(base)
    assert found.keys() == before.keys()  # tied: no lm_head
    assert "lm_head.weight" not in found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
        assert torch.equal(tensor, before[name]) != any(layer in name for layer in LAYERS)
    assert result.metrics["tensors_merged"] == 2 * len(LAYERS)
    assert result.metrics["parameters"] == sum(tensor.numel() for tensor in found.values())
    assert result.metrics["bytes"] == 4 * result.metrics["parameters"]
    assert 0 < result.metrics["max_logit_difference"] < 1e-3
    assert [event["type"] for event in events] == ["progress"]
    assert result.info["merged_by"] == "streaming"


def test_shards_in_and_out(untied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "base"
    shutil.copytree(untied, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(untied).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    adapter = save_adapter(sharded, tmp_path / "adapter")
    request = merge_request(tmp_path, adapter, max_shard_size="0.03MB")
    _, events = run_program(request)

    files = sorted(path.name for path in request.payload.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert [(event["step"], event["total"]) for event in events] == [(i, len(files)) for i in range(1, len(files) + 1)]
    index = json.loads((request.payload / "model.safetensors.index.json").read_text())
    found, expected = weights_in(request.payload), merged_by_peft(adapter)
    assert index["weight_map"].keys() == found.keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in found.values())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    # As transformers itself would have cut the same weights: nothing over the limit but single tensors.
    for file in files:
        sizes = [4 * found[name].numel() for name, place in index["weight_map"].items() if place == file]
        assert len(sizes) == 1 or sum(sizes) <= 30_000


@pytest.mark.parametrize(("stored", "asked", "written"), [("bfloat16", "auto", "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "float16", "float16")])  # fmt: skip
def test_types(tmp_path: Path, stored: str, asked: str, written: str) -> None:
    base = save_pico(tmp_path / "base", width=32, dtype=stored)
    adapter = save_adapter(base, tmp_path / "adapter")
    request = merge_request(tmp_path, adapter, dtype=asked)
    run_program(request)
    dtype = getattr(torch, written)
    expected = merged_by_peft(adapter)
    for name, tensor in weights_in(request.payload).items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.float(), expected[name].to(dtype).float(), atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert json.loads((request.payload / "config.json").read_text())["dtype"] == written


def test_tensors_of_several_types_keep_theirs(base: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "base"
    shutil.copytree(base, mixed)

    def lower_all_but_norms(tensors: dict[str, Any]) -> None:
        tensors.update({name: t.bfloat16() for name, t in tensors.items() if "norm" not in name})

    edit_weights(mixed / "model.safetensors", lower_all_but_norms)
    request = merge_request(tmp_path, save_adapter(mixed, tmp_path / "adapter"))
    run_program(request)
    assert {n: t.dtype for n, t in weights_in(request.payload).items()} == {n: t.dtype for n, t in weights_in(mixed).items()}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 16}, "rank_pattern": {"v_proj": 2}}, "alpha_pattern, rank_pattern"),
        ({"target_modules": ["lm_head", "q_proj"]}, "base_model.model.lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "base_model.model.model.embed_tokens"),
    ],
)
def test_peft_does_what_streaming_cannot(untied: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    adapter = save_adapter(untied, tmp_path / "adapter", **options)
    request = merge_request(tmp_path, adapter)
    result, events = run_program(request)
    assert next(event["message"] for event in events if event["type"] == "warning").startswith("merged by PEFT")
    assert reason in events[0]["message"]
    assert result.info["merged_by"] == "PEFT"
    expected = merged_by_peft(adapter)
    for name, tensor in weights_in(request.payload).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_fused_experts(tmp_path: Path) -> None:
    """transformers keeps a Mixtral's experts fused, its files keep them apart: such an adapter's weights have no name on disk."""
    from transformers import MixtralConfig, MixtralForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2, initializer_range=0.1, eos_token_id=words.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    names = weights_in(tmp_path / "base").keys()
    assert any("experts.0.w1" in name for name in names)
    attention = save_adapter(tmp_path / "base", tmp_path / "attention", target_modules=["q_proj"])
    result, _ = run_program(merge_request(tmp_path / "streamed", attention))
    assert result.info["merged_by"] == "streaming"
    experts = save_adapter(tmp_path / "base", tmp_path / "experts", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    request = merge_request(tmp_path / "peft", experts)
    result, _ = run_program(request)
    assert result.info["merged_by"] == "PEFT"
    assert weights_in(request.payload).keys() == names


def test_a_left_over_tensor_is_a_bug(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    file = adapter.path / "adapter_model.safetensors"
    edit_weights(file, lambda tensors: tensors.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}))
    with pytest.raises(StageFailed, match="do not fit the base, first base_model.model.model.layers.7.mlp.up_proj.lora_A") as error:
        run_program(merge_request(tmp_path / "more", adapter))
    assert error.value.failure_class == "bug"
    events = (tmp_path / "more" / "work" / "events.jsonl").read_text()
    assert "the base keeps model.layers.7.mlp.up_proj under another name or fused with others" in events

    adapter = save_adapter(base, tmp_path / "adapter2")
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    edit_weights(adapter.path / "adapter_model.safetensors", lambda tensors: tensors.pop(gone))
    with pytest.raises(StageFailed, match=f"first {gone}"):
        run_program(merge_request(tmp_path / "less", adapter))


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    tied_head = save_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(StageFailed, match="changes lm_head, but the base's embeddings and head are one tied weight") as error:
        run_program(merge_request(tmp_path / "a", tied_head))
    assert error.value.failure_class == "config"

    adapter = save_adapter(base, tmp_path / "adapter")
    quantized = tmp_path / "base"
    shutil.copytree(base, quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    on_quantized = adapter.model_copy(update={"base": Input(path=quantized, digest="q", type="Model")})
    with pytest.raises(StageFailed, match="base is quantized") as error:
        run_program(merge_request(tmp_path / "b", on_quantized))
    assert error.value.failure_class == "config"
    assert "merge, then quantize" in error.value.hint


def test_tokenizer_template_and_eos_are_the_trained_ones(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    words = tokenizer()
    words.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    words.eos_token = "<|endoftext|>"
    assert words.eos_token_id != tokenizer().eos_token_id
    words.save_pretrained(adapter.path)
    request = merge_request(tmp_path, adapter)
    result, events = run_program(request)
    assert (request.payload / "chat_template.jinja").read_text() == words.chat_template
    assert result.info["template"] == merge.template_hash(words)
    for name in ("config.json", "generation_config.json"):  # what ended the base's answers stays beside it
        assert json.loads((request.payload / name).read_text())["eos_token_id"] == [words.eos_token_id, tokenizer().eos_token_id]
        assert any(event["message"].startswith(name) for event in events if event["type"] == "warning")
    assert not list(request.payload.glob("adapter_*"))


def test_named_templates_are_kept(base: Path, tmp_path: Path) -> None:
    """As Hermes and Command-R have them: transformers saves all but the default one into a folder."""
    adapter, words = save_adapter(base, tmp_path / "adapter"), tokenizer()
    words.chat_template = {"tool_use": "TOOLS " + words.chat_template, "default": words.chat_template, "rag": "DOCUMENTS"}
    words.save_pretrained(adapter.path)
    request = merge_request(tmp_path, adapter)
    result, _ = run_program(request)
    merged = AutoTokenizer.from_pretrained(request.payload)
    assert merged.chat_template == words.chat_template
    assert result.info["template"] == merge.template_hash(words)
    words.chat_template = dict(reversed(words.chat_template.items()))  # as another file system might list them
    assert result.info["template"] == merge.template_hash(words)


def test_an_eos_among_several_is_kept(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    ends = [0, tokenizer().eos_token_id]
    edit_json(folder / "generation_config.json", eos_token_id=ends)
    request = merge_request(tmp_path, save_adapter(folder, tmp_path / "adapter"))
    _, events = run_program(request)
    assert json.loads((request.payload / "generation_config.json").read_text())["eos_token_id"] == ends
    assert not [event for event in events if event["type"] == "warning"]


def test_the_check_sees_wrong_weights(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", use_rslora=True)
    request = merge_request(tmp_path, adapter)
    run_program(request)
    merged = Input(path=request.payload, digest="m", type="Model")
    file = request.payload / "model.safetensors"
    good = file.read_bytes()
    name = "model.layers.1.mlp.down_proj.weight"

    edit_weights(file, lambda tensors: tensors.update({name: weights_in(base)[name]}))  # one of fourteen left unmerged
    with pytest.raises(StageFailed, match="logits of the merged model differ .* by up to") as error:
        merge.check_logits(adapter, merged, tokenizer(), "float32")
    assert error.value.failure_class == "bug"
    file.write_bytes(good)
    assert merge.check_logits(adapter, merged, tokenizer(), "float32") < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "failure"), [("float32", "bug"), ("bfloat16", "data")])
def test_the_check_sees_a_wrong_scale_of_a_weak_adapter(base: Path, tmp_path: Path, dtype: str, failure: str) -> None:
    """Here the bound on logits alone would pass even the base itself."""
    adapter = save_adapter(base, tmp_path / "adapter", strength=5e-5)
    request = merge_request(tmp_path, adapter)
    run_program(request)
    double = merge_request(tmp_path / "double", adapter)
    edit_json(adapter.path / "adapter_config.json", lora_alpha=16)
    run_program(double)
    edit_json(adapter.path / "adapter_config.json", lora_alpha=8)
    for wrong in (double.payload, base):
        with pytest.raises(StageFailed, match="from base") as error:
            merge.check_logits(adapter, Input(path=wrong, digest="m", type="Model"), tokenizer(), dtype)
        assert error.value.failure_class == failure


def test_built_twice_it_is_the_same(base: Path, untied: Path, tmp_path: Path, elsewhere: Elsewhere) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=True)
    first, second = (merge_request(tmp_path / name, adapter, max_shard_size="1MB") for name in "ab")
    run_program(first)
    elsewhere.run(second)
    assert payload_digest(first) == payload_digest(second)
    assert str(tmp_path) not in "".join(path.read_text() for path in first.payload.glob("*config.json"))

    by_peft = save_adapter(untied, tmp_path / "adapter2", modules_to_save=["norm"])
    third, fourth = merge_request(tmp_path / "c", by_peft), merge_request(tmp_path / "d", by_peft)
    run_program(third)
    run_program(fourth)
    assert payload_digest(third) == payload_digest(fourth)
    metrics = json.loads((second.work / "result.json").read_text())["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
