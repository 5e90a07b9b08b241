"""The methods of sft on pico models: a model that is trained whole, and adapters on bases of few bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere
from peft import PeftModel
from pico import save_pico
from process_tools import finish, losses, steps
from program_tools import emulates_bfloat16, make_request, payload_digest, run_program, run_until
from safetensors.torch import load_file, save_file
from sft_tools import OTHERS, ROWS, TURNING, dataset, request_for, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.data.rows import write_rows
from tasks.models.loading import load_model
from tasks.training import methods
from tuneline.errors import StageFailed
from tuneline.kinds.sft import SftStage
from tuneline.workspace.protocol import Input, Request

WHOLE: dict[str, Any] = {"method": "full", "learning_rate": 1e-3}
QLORA: dict[str, Any] = {"method": "qlora"}


def model_of(request: Request) -> dict[str, torch.Tensor]:
    return {name: tensor for file in request.payload.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def model(folder: Path, **options: Any) -> Input:
    return Input(path=save_pico(folder, **options), digest="b" * 64, type="Model")


# --- full -------------------------------------------------------------------------------------------------------------


def test_every_weight_learns_and_a_canonical_model_is_handed_over(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path, base, **WHOLE, max_steps=20)
    result, events = run_program(request)
    curve = [event["value"] for event in events if event.get("name") == "loss"]
    assert curve[-1] < 0.6 * curve[0]
    before, after = load_file(base.path / "model.safetensors"), model_of(request)
    assert "lm_head.weight" not in after  # tied
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert all(not tensor.equal(before[name]) for name, tensor in after.items())
    assert result.metrics["trainable_parameters"] == result.metrics["all_parameters"] == sum(tensor.numel() for tensor in after.values())
    assert {path.name for path in request.payload.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert str(tmp_path) not in (request.payload / "config.json").read_text()
    assert result.info["template"]

    loaded = AutoModelForCausalLM.from_pretrained(request.payload)  # and others can load it
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(request.payload).chat_template


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_another_process_and_folder_give_the_same_bytes(tmp_path: Path, base: Input, method: str, elsewhere: Elsewhere) -> None:
    here, there = (request_for(tmp_path / name, base, method=method, learning_rate=1e-3) for name in ("here", "there"))
    run_program(here)
    elsewhere.run(there)
    assert payload_digest(there) == payload_digest(here)


def test_files_and_types_stay_the_bases(tmp_path: Path) -> None:
    """A base in bfloat16 of several files, with a norm in float32 and a head of its own: trained in float32, saved as it was."""
    whole = model(tmp_path / "whole", dtype="bfloat16", tied=False)
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole.path, dtype="auto").save_pretrained(folder, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(whole.path).save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, file, metadata={"format": "pt"})
    given = Input(path=folder, digest="b" * 64, type="Model")

    request = request_for(tmp_path / "run", given, **WHOLE, max_steps=2)
    run_program(request)
    names = {path.name for path in folder.glob("model*")}
    assert len(names) > 2
    assert {path.name for path in request.payload.glob("model*")} == names
    after = model_of(request)
    assert after.pop("model.norm.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert "lm_head.weight" in after
    trained = load_file(request.work / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(request.payload, dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_model_trained_whole_is_evaluated_and_trained_on(tmp_path: Path, base: Input) -> None:
    first = request_for(tmp_path / "first", base, **WHOLE, max_steps=40)
    result, _ = run_program(first)
    trained = Input(path=first.payload, digest="c" * 64, type="Model", template=result.info["template"])
    data = dataset(tmp_path / "data", OTHERS)
    write_rows(ROWS[:3], data.path / "test.parquet")
    config = {"kind": "evaluate", "model": "m", "datasets": ["d"], "max_new_tokens": 4}
    bits = []
    for name, source in (("base", base), ("trained", trained)):
        scored, _ = run_program(make_request(tmp_path / f"evaluate-{name}", config, {"model": source, "datasets.0": data}))
        bits.append(scored.metrics["dataset0/bits_per_byte"])
    assert bits[1] < 0.5 * bits[0]

    second = request_for(tmp_path / "second", trained, learning_rate=1e-3, max_steps=2)  # an adapter on it
    run_program(second)
    assert losses(second)[1] < losses(first)[1]


def test_packing_validation_and_small_micro_batches_with_every_weight(tmp_path: Path, base: Input) -> None:
    fields = {**WHOLE, "max_steps": 4, "validation": OTHERS[:3], "eval_steps": 2}
    four, one = (
        request_for(tmp_path / str(micro), base, **fields, resources={"micro_batch_size": micro, "gradient_checkpointing": micro == 1})
        for micro in (4, 1)
    )
    for request in (four, one):
        run_program(request)
    assert list(losses(one).values()) == pytest.approx(list(losses(four).values()), rel=1e-3)
    assert list(losses(one, "eval_loss").values()) == pytest.approx(list(losses(four, "eval_loss").values()), rel=1e-3)
    run_program(request_for(tmp_path / "packed", base, **WHOLE, max_steps=2, packing=True, max_length=128))


@pytest.mark.slow
def test_early_stopping_keeps_the_best_model(tmp_path: Path, base: Input) -> None:
    """Also after a kill, and where the kill came after the last step."""
    fields = {**TURNING, "method": "full", "learning_rate": 3e-3}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    result, _ = run_program(whole)
    best = int(result.metrics["best_step"])
    assert result.metrics["steps"] == best + 4 < 60
    kept = load_file(whole.work / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    assert all(tensor.equal(kept[name]) for name, tensor in model_of(whole).items())
    run_until(killed, best + 3)
    for _ in range(2):
        assert run_program(killed)[0].metrics == result.metrics
        assert payload_digest(killed) == payload_digest(whole)


@pytest.mark.slow
def test_killed_a_whole_model_ends_bit_for_bit_as_undisturbed(tmp_path: Path, base: Input) -> None:
    fields = {**WHOLE, "max_steps": 16, "eval_steps": 7, "validation": OTHERS[:3], "resources": {"checkpoint_steps": 5}}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    for step in (2, 9):
        run_until(killed, step)
    before = len(steps(killed))
    assert run_program(killed)[0].metrics == expected.metrics
    assert steps(killed)[before:] == list(range(6, 17))
    assert payload_digest(killed) == payload_digest(whole)
    assert (losses(killed), losses(killed, "eval_loss")) == (losses(whole), losses(whole, "eval_loss"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.full), "qlora"])
def test_two_processes_train_what_one_does(tmp_path: Path, base: Input, method: str) -> None:
    fields = {"method": method, "learning_rate": 1e-3, "validation": OTHERS[:3], "eval_steps": 3}
    one, two = (request_for(tmp_path / str(n), base, **fields, resources={"processes": n}) for n in (1, 2))
    expected, _ = run_program(one)
    assert finish(two, 2) == pytest.approx(expected.metrics, rel=1e-3)
    read = model_of if method == "full" else weights
    assert all(tensor.allclose(read(two)[name], atol=1e-4) for name, tensor in read(one).items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_a_model_split_over_processes_is_whole_again(
    tmp_path: Path,
    base: Input,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a kill came after the last step, and it is taken from its checkpoint."""
    if strategy == "fsdp":
        monkeypatch.setenv("PATCHES", "fsdp_on_cpus")
    fields = {**WHOLE, "validation": OTHERS[:3], "eval_steps": 3}
    one = request_for(tmp_path / "one", base, **fields)
    expected, _ = run_program(one)
    two = request_for(tmp_path / "two", base, **fields, resources={"processes": 2, "strategy": strategy})
    for _ in range(2):
        assert finish(two, 2) == pytest.approx(expected.metrics, rel=1e-3)
        assert all(tensor.allclose(model_of(two)[name], atol=1e-3) for name, tensor in model_of(one).items())
        shutil.rmtree(two.payload)
        two.payload.mkdir()


def test_the_saved_model_is_checked(tmp_path: Path, base: Input) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    good = {name: tensor + 1 for name, tensor in load_file(base.path / "model.safetensors").items()}
    norm = "model.norm.weight"
    faults = {
        "bug: model.safetensors of the model has 1 missing or additional tensors, the first model.norm.weight": {
            name: tensor for name, tensor in good.items() if name != norm
        },
        "bug: model.norm.weight of the model: found torch.bfloat16 .64., expected torch.float32": good | {norm: good[norm].bfloat16()},
        "bug: model.norm.weight of the model: found torch.float32 .63., expected": good | {norm: good[norm][1:].clone()},
        "data: model.norm.weight of the model is not finite": good | {norm: good[norm] * float("nan")},
        "data: the training changed nothing": load_file(base.path / "model.safetensors"),
        "": good,
    }  # fmt: skip
    for expected, tensors in faults.items():
        save_file(tensors, saved / "model.safetensors")
        if not expected:
            methods.check_model(saved, base)
            continue
        failure_class, message = expected.split(": ", 1)
        with pytest.raises(StageFailed, match=message) as caught:
            methods.check_model(saved, base)
        assert caught.value.failure_class == failure_class


def test_a_training_that_changes_nothing_is_no_model(tmp_path: Path, base: Input) -> None:
    with pytest.raises(StageFailed, match="every weight has its initial value"):
        run_program(request_for(tmp_path, base, method="full", learning_rate=1e-300))


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_quantized_base_is_refused(tmp_path: Path, base: Input, method: str) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(base.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(StageFailed, match=f"method: {method}: found a base that is quantized, expected one in full precision") as caught:
        run_program(request_for(tmp_path / "run", base.model_copy(update={"path": folder}), method=method))
    assert caught.value.failure_class == "config"


def test_weights_that_a_checkpoint_would_not_bring_back_are_refused(tmp_path: Path, base: Input) -> None:
    """As those of experts, which transformers holds as one: it would resume from the base's, and say so in its log alone."""
    folder = tmp_path / "renamed"
    shutil.copytree(base.path, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    renamed = base.model_copy(update={"path": folder})
    loaded = load_model(base, torch.float32)
    methods.check_names(loaded, base)
    message = r"found 21 weights that transformers renames, the first lm_head.weight"
    with pytest.raises(StageFailed, match=message) as caught:
        methods.check_names(loaded, renamed)
    assert caught.value.failure_class == "config"


# --- qlora ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_few_bits_learns_nearly_as_one_on_the_base(tmp_path: Path, base: Input, bits: int) -> None:
    lora, qlora = (
        request_for(tmp_path / name, base, **fields, max_steps=20, validation=OTHERS[:3], eval_steps=5)
        for name, fields in {"lora": {}, "qlora": {**QLORA, "bits": bits}}.items()
    )
    for request in (lora, qlora):
        run_program(request)
    rel = 0.1 if bits == 4 else 0.02
    assert list(losses(qlora).values()) == pytest.approx(list(losses(lora).values()), rel=rel)
    assert list(losses(qlora, "eval_loss").values()) == pytest.approx(list(losses(lora, "eval_loss").values()), rel=rel)
    assert losses(qlora) != losses(lora)
    assert {tensor.dtype for tensor in weights(qlora).values()} == {torch.float32}
    a, b = (json.loads((request.payload / "adapter_config.json").read_text()) for request in (lora, qlora))
    assert a == b  # an adapter of the base in full precision
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), qlora.payload)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_on_few_bits_are_those_of_the_same_weights_in_full(base: Input, bits: int) -> None:
    """Also after an evaluation, from which on bitsandbytes would give lower layers a part of theirs on some CPUs."""
    stage = SftStage.model_validate({"kind": "sft", "model": "m", "dataset": "d", "method": "qlora", "bits": bits, "dtype": "float32"})
    few = methods.load_base(base, stage)
    few.get_input_embeddings().weight.requires_grad_()
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        few.eval()(ids)
    few.train()(ids, labels=ids).loss.backward()
    found = few.get_input_embeddings().weight.grad
    full = few.dequantize()
    full.get_input_embeddings().weight.grad = None
    full(ids, labels=ids).loss.backward()
    expected = full.get_input_embeddings().weight.grad
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())


def test_the_base_is_held_in_4_bits_of_normal_floats_with_quantized_scales(base: Input) -> None:
    from bitsandbytes.nn import Linear4bit

    stage = SftStage.model_validate({"kind": "sft", "model": "m", "dataset": "d", "method": "qlora", "dtype": "bfloat16"})
    loaded = methods.load_base(base, stage)
    layers = [module for module in loaded.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert {(layer.weight.quant_state.quant_type, layer.weight.quant_state.nested, layer.compute_dtype) for layer in layers} == {
        ("nf4", True, torch.bfloat16)
    }
    assert sum(layer.weight.numel() for layer in layers) * 2 == sum(layer.in_features * layer.out_features for layer in layers)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": {"r": 4, "lora_alpha": 8, "use_dora": True}},
        {"packing": True, "max_length": 128},
        pytest.param(
            {"dtype": "bfloat16", "max_steps": 2}, marks=pytest.mark.skipif(emulates_bfloat16(), reason="this CPU only emulates bfloat16")
        ),
        {"resources": {"gradient_checkpointing": True, "micro_batch_size": 2}},
    ],
)
def test_variants_of_qlora(tmp_path: Path, base: Input, fields: dict[str, Any]) -> None:
    request = request_for(tmp_path, base, **QLORA, **fields)
    run_program(request)
    assert {tensor.dtype for tensor in weights(request).values()} == {torch.float32}


def test_an_adapter_of_few_bits_is_merged_into_the_base_and_gone_on_from(tmp_path: Path) -> None:
    base = Input(path=save_pico(tmp_path / "base"), digest="b" * 64, type="Model")
    first = request_for(tmp_path / "first", base, **QLORA, max_steps=20)
    result, _ = run_program(first)
    adapter = Input(path=first.payload, digest="a" * 64, type="Adapter", base=base, template=result.info["template"])
    merged = make_request(tmp_path / "merged", {"kind": "merge", "adapters": ["first"]}, {"adapters.0": adapter})
    assert run_program(merged)[0].metrics["max_logit_difference"] < 1e-3
    assert "quantization_config" not in json.loads((merged.payload / "config.json").read_text())

    second = request_for(tmp_path / "second", base, **QLORA, adapter="first", inputs={"adapter": adapter}, max_steps=1, learning_rate=1e-9)
    run_program(second)
    furthest = max(float((tensor - weights(second)[name]).abs().max()) for name, tensor in weights(first).items())
    assert 0 < furthest < 1e-7  # in bfloat16 it would have lost digits on the way
    assert losses(second)[1] < losses(first)[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_resumed_on_few_bits_it_ends_bit_for_bit(tmp_path: Path, base: Input, bits: int) -> None:
    fields = {**QLORA, "bits": bits, "max_steps": 8, "eval_steps": 3, "validation": OTHERS[:3], "resources": {"checkpoint_steps": 3}}
    fields |= {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    run_until(killed, 5)
    assert run_program(killed)[0].metrics == expected.metrics
    assert payload_digest(killed) == payload_digest(whole)


def test_a_device_that_cannot_is_named(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails, and one that hands back no gradient or a wrong one: none of them trains."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    def wrong(self: Any, rows: Any) -> Any:
        return rows * 0.0

    for layer, bits in ((Linear4bit, 4), (Linear8bitLt, 8)):
        for forward, problem in ((fails, "fails: RuntimeError: no kernel image is available"), (wrong, "is off by 100%")):
            with monkeypatch.context() as patch:
                patch.setattr(layer, "forward", forward)
                with pytest.raises(StageFailed, match="method: qlora") as caught:
                    run_program(request_for(tmp_path / f"{bits}{problem[:2]}", base, **QLORA, bits=bits))
            assert caught.value.message == f"method: qlora: a layer of {bits} bits on cpu {problem}"
            assert caught.value.failure_class == "config"
            assert "method: lora" in caught.value.hint
    methods.check_bits(4, torch.bfloat16)
    methods.check_bits(8, torch.float32)
