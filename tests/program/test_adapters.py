"""Every kind of adapter and of first weights: trained, resumed, read by PEFT on the untouched base, merged."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import architecture_table
import evaluate_tools
import pytest
import torch
from adapter_variants import LORA, VARIANTS
from bitsandbytes.functional import dequantize_4bit
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from pico import save_pico
from process_tools import finish, losses
from program_tools import make_request, payload_digest, run_program, run_until
from safetensors.torch import load_file, save_file
from sft_tools import furthest, request_for, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.convert.export import write_adapter
from tasks.convert.usage import usage
from tasks.training import answers
from tasks.training.rank_allocation import skewness
from tuneline.errors import StageFailed
from tuneline.kinds.export import ExportStage
from tuneline.workspace.protocol import Events, Input

IN_CI = {"pissa", "tokens"}
CASES = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.full) for name in VARIANTS]
IDS = torch.arange(5, 60)[None]


@pytest.mark.parametrize("name", CASES)
def test_a_variant_is_trained_resumed_read_by_peft_and_merged(
    name: str, base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "untied" in name:
        base = Input(path=save_pico(tmp_path / "untied", tied=False), digest="b" * 64, type="Model")
    trained: list[torch.Tensor] = []
    monkeypatch.setattr(answers, "trained_weights", keeping_logits(answers.trained_weights, trained))
    whole, killed = (
        request_for(tmp_path / each, base, **VARIANTS[name], resources={"checkpoint_steps": 2}) for each in ("whole", "killed")
    )
    run_program(whole)
    run_until(killed, 1)  # before a checkpoint
    run_until(killed, 5)
    run_program(killed)
    assert payload_digest(killed) == payload_digest(whole)
    assert min(losses(whole).values()) < losses(whole)[1]

    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base.path)
        if "add_tokens" in VARIANTS[name]:
            plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(whole.payload)))
        before = plain(IDS).logits
        after = PeftModel.from_pretrained(plain, whole.payload)(IDS).logits
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, trained[0], atol=1e-4, rtol=1e-4)

    adapter = Input(path=whole.payload, digest="a" * 64, type="Adapter", base=base)
    request = make_request(tmp_path / "merge", {"kind": "merge", "adapters": ["sft"]}, {"adapters.0": adapter})
    run_program(request)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(request.payload)(IDS).logits
    torch.testing.assert_close(merged, after, atol=1e-4, rtol=1e-4)

    stage, exported, loaded = ExportStage(kind="export", of="sft"), tmp_path / "exported", dict[str, Any]()
    exported.mkdir()
    code = usage(stage, write_adapter(adapter, None, stage, exported, Events(tmp_path / "events.jsonl")), False)
    assert ("resize_token_embeddings" in code) == ("add_tokens" in VARIANTS[name])
    monkeypatch.chdir(exported)
    exec(code.split("```")[1].removeprefix("python"), loaded)  # as its model card says
    with torch.no_grad():
        torch.testing.assert_close(loaded["model"](IDS).logits, after, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("pissa", "ddp"), ("olora", "zero2"), ("eva", "ddp"), ("tokens", "zero2"), ("modules", "ddp"), ("lora+", "zero3"), ("vera", "zero2"),
        ("oft", "ddp"), ("ia3", "zero1"), ("adalora", "ddp"),
    ],
)  # fmt: skip
def test_two_processes_train_the_same(name: str, strategy: str, base: Input, tmp_path: Path) -> None:
    fields = {key: {field: value for field, value in given.items() if "dropout" not in field} if isinstance(given, dict) else given
              for key, given in VARIANTS[name].items()}  # fmt: skip
    one, two = (request_for(tmp_path / each, base, **fields, resources=resources)
                for each, resources in (("one", {}), ("two", {"processes": 2, "strategy": strategy})))  # fmt: skip
    run_program(one)
    finish(two, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert furthest(one, two) < 2e-3


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adalora_resumes_before_and_after_each_reduction_of_ranks(dtype: str, base: Input, tmp_path: Path) -> None:
    fields = {
        **VARIANTS["adalora"],
        "dtype": dtype,
        "max_steps": 8,
        "resources": {"checkpoint_steps": 1},
    }  # ranks are reduced at steps 2, 4 and 6
    whole, killed = (request_for(tmp_path / each, base, **fields) for each in ("whole", "killed"))
    run_program(whole)
    for step in range(2, 9):  # resumes from the step before
        run_until(killed, step)
    run_program(killed)
    assert payload_digest(killed) == payload_digest(whole)
    assert losses(killed) == losses(whole)

    pattern = json.loads((whole.payload / "adapter_config.json").read_text())["rank_pattern"]
    left = {name: sum(ranks) for name, ranks in pattern.items()}
    saved = {name: tensor.shape[0] for name, tensor in weights(whole).items() if "lora_E" in name}
    assert saved == {f"base_model.model.{name}": rank for name, rank in left.items()}
    values = [tensor for name, tensor in weights(whole).items() if "lora_E" in name]
    assert sum(int((tensor != 0).sum()) for tensor in values) == 3 * len(left)  # target_r of each layer, as the mean
    assert len(set(left.values())) > 1

    adapter = Input(path=whole.payload, digest="a" * 64, type="Adapter", template=base.template, base=base)
    scored = evaluate_tools.request_for(tmp_path / "scored", adapter, evaluate_tools.CHATS[:2])
    run_program(scored)
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), whole.payload)
    encoder = AutoTokenizer.from_pretrained(whole.payload)
    for sample in evaluate_tools.samples(scored):
        ids = encoder(sample["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        answer = read.generate(input_ids=ids, max_new_tokens=evaluate_tools.CONFIG["max_new_tokens"], do_sample=False)[0, ids.shape[1] :]
        assert sample["answer"].strip() == encoder.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.full
def test_micro_batches_do_not_change_adalora(base: Input, tmp_path: Path) -> None:
    fields = {"adalora": {**VARIANTS["adalora"]["adalora"], "lora_dropout": 0}, "learning_rate": 2e-2}
    one, two = (request_for(tmp_path / f"{size}", base, **fields, resources={"micro_batch_size": size}) for size in (1, 2))
    run_program(one)
    run_program(two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert furthest(one, two) < 2e-3


@pytest.mark.full
def test_the_penalty_of_adalora_is_that_of_peft(base: Input) -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=5, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config)
    with torch.no_grad():
        with_penalty = model(IDS, labels=IDS).loss
        model.peft_config["default"].orth_reg_weight = 0
        without = model(IDS, labels=IDS).loss
    torch.testing.assert_close(0.5 * skewness(model), with_penalty - without)


@pytest.mark.full
def test_adalora_that_leaves_no_rank_ends_with_a_reason(base: Input, tmp_path: Path) -> None:
    fields = {"adalora": {"init_r": 4, "target_r": 2, "orth_reg_weight": 0}, "learning_rate": 1e-38}
    with pytest.raises(StageFailed, match="the training left no rank"):
        run_program(request_for(tmp_path, base, **fields))


def test_loftq_starts_near_the_base_and_resumes(base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    seen: list[tuple[float, float, float]] = []
    trained: list[torch.Tensor] = []
    real = answers.trained_weights

    def train(trainer: Any, *args: Any) -> Any:
        with torch.no_grad():
            for name, layer in trainer.model.named_modules():
                if isinstance(layer, Linear4bit):
                    weight, quantized = plain.get_submodule(name.removeprefix("base_model.model.")).weight, layer.get_base_layer().weight
                    lost = weight - dequantize_4bit(quantized.data, quantized.quant_state)
                    rest = torch.linalg.svdvals(lost)[layer.r["default"] :].norm()
                    seen.append((float(lost.norm()), float((lost - layer.get_delta_weight("default")).norm()), float(rest)))
        return keeping_logits(real, trained)(trainer, *args)

    monkeypatch.setattr(answers, "trained_weights", train)
    fields = {"method": "qlora", "lora": {**LORA, "lora_alpha": 16, "rank_pattern": {"down_proj": 8}, "init_lora_weights": "loftq"}}
    whole, killed = (request_for(tmp_path / each, base, **fields, resources={"checkpoint_steps": 2}) for each in ("whole", "killed"))
    run_program(whole)
    assert len(seen) == 14
    for lost, left, least in seen:
        assert left == pytest.approx(least, rel=1e-4)
        assert left < lost
    run_until(killed, 5)
    run_program(killed)
    assert payload_digest(killed) == payload_digest(whole)
    assert min(losses(whole).values()) < losses(whole)[1]

    usual = request_for(tmp_path / "usual", base, method="qlora", lora={**LORA, "lora_alpha": 16, "rank_pattern": {"down_proj": 8}})
    run_program(usual)
    with torch.no_grad():  # the full base with its adapter is closer to the model that was trained than without LoftQ
        apart = [float((PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), request.payload)(IDS).logits - logits).norm())
                 for request, logits in ((whole, trained[0]), (usual, trained[-1]))]  # fmt: skip
    assert apart[0] < apart[1]

    adapter = Input(path=whole.payload, digest="a" * 64, type="Adapter", base=base)
    request = make_request(tmp_path / "merge", {"kind": "merge", "adapters": ["sft"]}, {"adapters.0": adapter})
    run_program(request)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(request.payload)(IDS).logits
        torch.testing.assert_close(merged, PeftModel.from_pretrained(plain, whole.payload)(IDS).logits, atol=1e-4, rtol=1e-4)


def test_loftq_of_transposed_weights_under_published_names(tmp_path: Path) -> None:
    base = architecture_table.save(tmp_path / "model", "gpt2")
    file = base.path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    fields: dict[str, Any] = {"method": "qlora", "max_steps": 2, "lora": {**LORA, "init_lora_weights": "loftq"}}
    run_program(request_for(tmp_path / "sft", base, **fields))


def test_a_base_that_bitsandbytes_leaves_as_it_is_is_refused(tmp_path: Path) -> None:
    base = architecture_table.save(tmp_path / "model", "falcon")
    with pytest.raises(StageFailed, match="method: qlora: found no layer that bitsandbytes quantizes in a model of type falcon"):
        run_program(request_for(tmp_path / "sft", base, method="qlora"))


@pytest.mark.full
def test_an_adapter_of_a_changed_base_is_trained_further_at_its_saved_rank(base: Input, tmp_path: Path) -> None:
    first = request_for(tmp_path / "first", base, **VARIANTS["pissa"])
    run_program(first)
    adapter = Input(path=first.payload, digest="a" * 64, type="Adapter", base=base)
    for name, lora in (("same", LORA), ("saved", {"r": 8, "lora_alpha": 16})):
        more = request_for(tmp_path / name, base, adapter="first", inputs={"adapter": adapter}, lora=lora)
        with pytest.raises(StageFailed, match="found r 8 instead of 4") if name == "same" else nullcontext():
            run_program(more)
    assert losses(more)[1] < losses(first)[1]


def keeping_logits(real: Any, kept: list[torch.Tensor]) -> Any:
    def end(trainer: Any, *args: Any) -> Any:
        found = real(trainer, *args)
        with torch.no_grad():
            kept.append(trainer.model.eval()(IDS).logits)
        return found

    return end
