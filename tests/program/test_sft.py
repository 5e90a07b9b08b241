"""The sft program on pico models: what TRL is really fed, what it hands over, and how it goes on after a kill."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere
from peft import PeftModel
from pico import tokenizer
from program_tools import emulates_bfloat16, payload_digest, run_program, run_until
from safetensors.torch import load_file, save_file
from sft_tools import OTHERS, ROWS, SMALL, TURNING, chat, furthest, request_for, weights
from transformers import AutoModelForCausalLM

from tasks.data.masks import tokenize
from tasks.data.rows import Row
from tasks.models.targets import Targets
from tasks.training import sft
from tasks.training import shared as training
from tasks.training.checkpoints import MARKER
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Lora
from tuneline.workspace.protocol import Events, Input, Request


def test_it_learns_and_hands_over_a_canonical_adapter(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path, base, max_steps=20, learning_rate=2e-2)
    result, events = run_program(request)
    losses = [event["value"] for event in events if event.get("name") == "loss"]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]
    assert result.metrics["loss"] == pytest.approx(sum(losses[-10:]) / 10)
    assert {"learning_rate", "grad_norm", "tokens_per_second", "trainable_parameters", "all_parameters"} <= {e.get("name") for e in events}
    progress = [event for event in events if event["type"] == "progress"]
    assert (progress[-1]["step"], progress[-1]["total"]) == (20, 20)

    history = [json.loads(line) for line in (request.meta / "history.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in history if "loss" in entry] == losses

    names = {path.name for path in request.payload.rglob("*")}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    config = json.loads((request.payload / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tuneline:" + "b" * 64
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert str(tmp_path) not in (request.payload / "adapter_config.json").read_text()

    model = AutoModelForCausalLM.from_pretrained(base.path)  # and others can load it
    assert len(PeftModel.from_pretrained(model, request.payload).peft_config) == 1


@pytest.mark.parametrize("train_on", ["assistant", "completion", "all"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_collated_labels_are_exactly_the_turns(
    tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch, packing: bool, train_on: str
) -> None:
    from tasks.training.sft_trainer import TokenWeightedTrainer

    batches: list[dict[str, Any]] = []
    step = TokenWeightedTrainer.training_step

    def spy(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        batches.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(TokenWeightedTrainer, "training_step", spy)
    words = tokenizer()
    fields = {"max_length": 128} if packing else {}
    request = request_for(
        tmp_path, base, max_steps=None, num_train_epochs=1, global_batch_size=2, packing=packing, train_on=train_on, **fields
    )
    result, _ = run_program(request)

    real = [batch["input_ids"][batch["attention_mask"].bool()] if "attention_mask" in batch else batch["input_ids"][0] for batch in batches]
    fed = words.decode(torch.cat(real))
    trained = [words.decode(row[row != -100]) for batch in batches for row in batch["labels"]]
    answers = [[message["content"] for message in row.messages or () if message["role"] == "assistant"] for row in ROWS]
    counted = answers if train_on == "assistant" else [turns[-1:] for turns in answers]
    assert all(words.decode(tokenize(row, words).input_ids) in fed for row in ROWS)
    if train_on == "all":
        assert len("".join(trained)) > 0.9 * len(fed)  # a packed row's first token is not predicted
    else:  # rows are joined, packed or not
        assert sorted("".join(trained).split("<|im_end|>\n")) == sorted(["", *(turn for turns in counted for turn in turns)])
    expected = sum(sum(tokenize(row, words, train_on).trained[1:]) for row in ROWS)
    assert result.metrics["trained_tokens"] == expected


def test_packed_rows_do_not_see_one_another(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """One packed sequence of two rows and the two rows side by side are the same step."""
    rows = [chat(1, 2), chat(2, 3)]
    packed = request_for(tmp_path / "packed", base, rows, packing=True, max_length=256, global_batch_size=1, max_steps=3)
    padded = request_for(tmp_path / "padded", base, rows, global_batch_size=2, max_steps=3)
    losses = [[e["value"] for e in run_program(request)[1] if e.get("name") == "loss"] for request in (packed, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    unbroken = staticmethod(lambda lengths: [torch.arange(sum(row)) for row in lengths])
    monkeypatch.setattr(DataCollatorForLanguageModeling, "get_position_ids_from_packed_seq_lengths", unbroken)
    with pytest.raises(StageFailed, match="packed rows attend to one another"):
        run_program(request_for(tmp_path / "planted", base, rows, packing=True, max_length=256, global_batch_size=1, max_steps=3))


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        ({"lora": {"r": 4, "lora_alpha": 8, "use_rslora": True}}, 28),
        ({"lora": {"r": 4, "lora_alpha": 8.0, "use_dora": True, "lora_dropout": 0.1}}, 42),
        ({"lora": {"r": 2, "target_modules": ["v_proj", "self_attn.q_proj"]}}, 8),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0.5, "weight_decay": 0.1, "max_grad_norm": 0.5}, 28),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "resources": {"gradient_checkpointing": True}}, 28),
        pytest.param(
            {"dtype": "bfloat16", "max_steps": 2},
            28,
            marks=pytest.mark.skipif(emulates_bfloat16(), reason="this CPU only emulates bfloat16"),
        ),
    ],
)
def test_variants(tmp_path: Path, base: Input, fields: dict[str, Any], tensors: int) -> None:
    request = request_for(tmp_path, base, **fields)
    _, events = run_program(request)
    assert len(weights(request)) == tensors
    config = json.loads((request.payload / "adapter_config.json").read_text())
    for name, value in fields.get("lora", {}).items():
        assert config[name] == (sorted(value) if isinstance(value, list) else value)
    assert isinstance(config["lora_alpha"], int)
    rates = [event["value"] for event in events if event.get("name") == "learning_rate"]
    if "warmup_steps" in fields:
        assert rates[0] == 0
        assert rates.index(max(rates)) == (3 if fields["warmup_steps"] < 1 else 2)


@pytest.mark.slow
def test_gradient_checkpointing_and_micro_batches_change_nothing(tmp_path: Path, base: Input) -> None:
    """Rows of unequal length, and a last step of fewer rows: a loss averaged by batch and not by token would differ."""
    fields = {"max_steps": None, "num_train_epochs": 2, "validation": OTHERS[:5], "eval_steps": 2}
    runs = {}
    for name, resources in {"4": {}, "2": {"micro_batch_size": 2}, "1": {"micro_batch_size": 1, "gradient_checkpointing": True}}.items():
        request = request_for(tmp_path / name, base, resources=resources, **fields)
        _, events = run_program(request)
        losses = [e["value"] for e in events if e.get("name") == "loss"]
        runs[name] = losses, [e["value"] for e in events if e.get("name") == "eval_loss"]
        assert len(losses) == 6
    for name in ("2", "1"):
        assert runs[name][0] == pytest.approx(runs["4"][0], rel=1e-3)
        assert runs[name][1] == pytest.approx(runs["4"][1], rel=1e-3)


@pytest.mark.slow
def test_nothing_is_padded_and_the_loss_is_that_of_any_layout_and_order(
    tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps hold the same rows, the last of an epoch too; only what is padded is less, in training as in validation. Where padding is
    needed, rows of similar length share a micro-batch."""
    from tasks.training import flattening, sft_trainer

    batches: list[tuple[bool, Any]] = []
    loss = sft_trainer.TokenWeightedTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        batches.append((model.training, inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))))
        return loss(self, model, inputs, *rest, **named)

    monkeypatch.setattr(sft_trainer.TokenWeightedTrainer, "compute_loss", spy)
    rows = [chat(i, 1 + 5 * i % 7) for i in range(19)]
    fields = {
        "max_steps": None, "num_train_epochs": 2, "eval_steps": 5, "validation": [chat(i, 1 + i % 4) for i in range(50, 60)],
        "global_batch_size": 8, "resources": {"micro_batch_size": 2},
    }  # fmt: skip
    found = []
    for name in ("flattened", "padded", "as-drawn"):
        if name != "flattened":
            monkeypatch.setattr(flattening, "unsuited", lambda *_: "it is a test")
        if name == "as-drawn":
            monkeypatch.setattr(sft_trainer, "longest_first", lambda rows, lengths: list(rows))
        batches.clear()
        result, events = run_program(request_for(tmp_path / name, base, rows, **fields))
        assert result.info["micro_batches"] == ("flattened, attention by_rows" if name == "flattened" else "padded: it is a test")
        curves = [[e["value"] for e in events if e.get("name") == curve] for curve in ("loss", "eval_loss")]
        training, validation = (torch.cat([mask.flatten() for trained, mask in batches if trained == which]) for which in (True, False))
        real = [int(mask.sum()) for mask in (training, validation)]
        found.append((curves, [len(training) - real[0], len(validation) - real[1]], real))
    (curves, nothing, tokens), (_, padding, _), (_, padding_as_drawn, _) = found
    for others, _, of_others in found[1:]:
        assert of_others == tokens
        for curve, other in zip(curves, others, strict=True):
            assert curve == pytest.approx(other, rel=1e-5)
    assert [len(curve) for curve in curves] == [6, 2]
    assert (nothing, padding, padding_as_drawn, tokens) == ([0, 0], [350, 52], [1290, 260], [4078, 1544])


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "all masked": (
        {"rows": [*ROWS, Row("s", messages=({"role": "user", "content": "Hi"},), id="mute")]},
        "data",
        "1 of 11 train rows, such as mute",
    ),
    "over-long": ({"max_length": 30}, "data", r"longer than max_length 30: row row0 has \d+ tokens"),
    "beyond the positions": (
        {"max_length": 8192, "rows": [chat(0, turns=150)]},
        "config",
        r"max_length: found rows of \d+ tokens, expected at most 2048, the model's positions",
    ),
    "no rows": ({"rows": []}, "data", "no rows in its train split"),
    "no validation rows": ({"eval_steps": 2}, "data", "no rows in its validation split"),
    "unknown module": (
        {"lora": {"target_modules": ["q_proj", "v_prj"]}},
        "config",
        "found v_prj, expected all-linear or some of down_proj",
    ),
    "the head": ({"lora": {"target_modules": ["lm_head"]}}, "config", "found lm_head"),
    "no learning": ({"learning_rate": 1e-300}, "data", "every lora_B"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, base: Input, fault: str) -> None:
    fields, failure_class, message = FAULTS[fault]
    with pytest.raises(StageFailed, match=message) as caught:
        run_program(request_for(tmp_path, base, **fields))
    assert caught.value.failure_class == failure_class
    assert caught.value.hint
    if fault == "unknown module":
        assert caught.value.hint == "did you mean v_proj?"


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, base: Input) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base.path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=r"loss is nan at step 1 of 6, with rows row\d, row\d, row\d, row\d\b") as caught:
        run_program(request_for(tmp_path / "a", Input(path=broken, digest="b" * 64, type="Model")))
    assert caught.value.failure_class == "data"
    assert "base model" in caught.value.hint


@pytest.mark.slow
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path: Path, base: Input) -> None:
    """Dropout on, three steps an epoch: killed in the second epoch, and again in the third and after the last step."""
    fields = {
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, "max_steps": 11, "eval_steps": 3,
        "resources": {"checkpoint_steps": 2, "micro_batch_size": 2}, "validation": OTHERS[:3],
    }  # fmt: skip
    whole = request_for(tmp_path / "whole", base, **fields)
    expected, _ = run_program(whole)

    killed = request_for(tmp_path / "killed", base, **fields)
    run_until(killed, 6)
    checkpoints = killed.work / "checkpoints"
    assert (checkpoints / "checkpoint-4" / MARKER).exists()
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-5")  # a write that the kill cut short
    (checkpoints / "checkpoint-5" / MARKER).unlink()
    (checkpoints / "checkpoint-5" / "optimizer.pt").write_bytes(b"half")
    run_until(killed, 9)
    assert not (checkpoints / "checkpoint-5").exists()
    result, events = run_program(killed)
    assert [e["step"] for e in events if e["type"] == "progress"] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert payload_digest(killed) == payload_digest(whole)
    assert result.metrics == expected.metrics

    shutil.rmtree(killed.payload)
    killed.payload.mkdir()
    again, events = run_program(killed)  # killed between the last checkpoint and its result: nothing is left to train
    assert len([e for e in events if e["type"] == "progress"]) == 12
    assert payload_digest(killed) == payload_digest(whole)
    assert again.metrics == expected.metrics


def test_a_training_resumes_with_a_smaller_micro_batch(tmp_path: Path, base: Input) -> None:
    """As after an out-of-memory: the same rows in the same steps."""
    whole = request_for(tmp_path / "whole", base)
    run_program(whole)
    killed = request_for(tmp_path / "killed", base, resources={"checkpoint_steps": 2})
    run_until(killed, 5)
    killed = killed.model_copy(update={"resources": {**killed.resources, "micro_batch_size": 1}})
    _, events = run_program(killed)
    assert [e["step"] for e in events if e["type"] == "progress"] == [1, 2, 3, 4, 5, 6]
    assert furthest(whole, killed) < 1e-4


@pytest.mark.slow
def test_early_stopping_keeps_the_best_adapter(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the turn changes nothing."""
    fields = TURNING
    whole = request_for(tmp_path / "whole", base, **fields)
    result, events = run_program(whole)
    evaluated = {e["step"]: e["value"] for e in events if e.get("name") == "eval_loss"}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert result.metrics["best_step"] == best
    assert result.metrics["steps"] == best + 4 < 60
    assert result.metrics["eval_loss"] == evaluated[best]
    kept = load_file(whole.work / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(tensor.equal(kept[name]) for name, tensor in weights(whole).items())

    killed = request_for(tmp_path / "killed", base, **fields, resources={"checkpoint_steps": 7})
    run_until(killed, best + 3)
    assert run_program(killed)[0].metrics == result.metrics
    assert payload_digest(killed) == payload_digest(whole)
    assert run_program(killed)[0].metrics == result.metrics
    assert payload_digest(killed) == payload_digest(whole)


@pytest.mark.slow
def test_going_on_from_an_adapter(tmp_path: Path, base: Input) -> None:
    first = request_for(tmp_path / "first", base, learning_rate=2e-2)
    first_losses = [e["value"] for e in run_program(first)[1] if e.get("name") == "loss"]
    adapter = Input(path=first.payload, digest="a" * 64, type="Adapter", base=base)

    def go_on(name: str, base: Input = base, **fields: Any) -> Request:
        return request_for(tmp_path / name, base, **{"adapter": "first", "inputs": {"adapter": adapter}, **fields})

    second = go_on("second", lora={**SMALL["lora"], "lora_dropout": 0.05})
    losses = [e["value"] for e in run_program(second)[1] if e.get("name") == "loss"]
    assert losses[0] < first_losses[-1] < first_losses[0]
    assert furthest(first, second) > 0
    assert json.loads((second.payload / "adapter_config.json").read_text())["base_model_name_or_path"] == "tuneline:" + "b" * 64

    with pytest.raises(StageFailed, match="found r 4 instead of 8") as caught:
        run_program(go_on("other-r", lora={"r": 8, "lora_alpha": 8}))
    assert caught.value.failure_class == "config"
    with pytest.raises(StageFailed, match="found target_modules that match 14 layers instead of 2"):
        run_program(go_on("other-modules", lora={**SMALL["lora"], "target_modules": ["q_proj"]}))
    with pytest.raises(StageFailed, match="another base model"):
        run_program(go_on("other-base", base.model_copy(update={"digest": "c" * 64})))
    with pytest.raises(StageFailed, match="every lora_B"):
        run_program(go_on("unchanged", learning_rate=1e-300))


def test_the_saved_adapter_is_checked(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path, base, max_steps=1)
    run_program(request)
    lora, events = Lora(**SMALL["lora"]), Events(tmp_path / "events.jsonl")
    found = Targets(frozenset(f"layer{i}" for i in range(14)), {}, exact=False)
    zero = {name: tensor * 0 for name, tensor in weights(request).items()}
    training.check_adapter(request.payload, lora, found, zero, events)
    assert not (tmp_path / "events.jsonl").exists()

    with pytest.raises(StageFailed, match="has lora_alpha 8, expected 16"):
        training.check_adapter(request.payload, lora.model_copy(update={"lora_alpha": 16}), found, zero, events)
    with pytest.raises(StageFailed, match="28 tensors, expected 30"):
        training.check_adapter(request.payload, lora, replace(found, layers=found.layers | {"one more"}), zero, events)
    good = weights(request)
    for planted, message in ((good | {min(good): good[min(good)] * float("inf")}, "not finite"), (zero, "every lora_B")):
        save_file(planted, request.payload / "adapter_model.safetensors")
        with pytest.raises(StageFailed, match=message):
            training.check_adapter(request.payload, lora, found, zero, events)
    layer = min(name for name in good if ".lora_B." in name)
    save_file(good | {layer: zero[layer]}, request.payload / "adapter_model.safetensors")
    training.check_adapter(request.payload, lora, found, zero, events)
    assert f"1 of 14 adapted layers did not change in the training, the first {layer}" in (tmp_path / "events.jsonl").read_text()


def test_the_head_works_on_trained_tokens_alone(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    scored: list[int] = []
    kernel = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda hidden, *rest: (scored.append(len(hidden)), kernel(hidden, *rest))[1]
    )
    result, _ = run_program(request_for(tmp_path, base, max_steps=2))
    assert sum(scored[1:]) == result.metrics["trained_tokens"]  # the first is the check of the loss


def test_what_trl_might_drop_is_found() -> None:
    from datasets import Dataset

    given = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [-100, 5]]})
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    plain, flat = DataCollatorForLanguageModeling(0), DataCollatorForLanguageModeling(0, padding_free=True)
    sft.check_nothing_lost(given, given, plain)
    sft.check_nothing_lost(given, sft.packed(given, 8), flat)
    for lossy in (given.select([0]), sft.packed(given, 2), given.map(lambda row: {"labels": [-100] * len(row["labels"])})):
        with pytest.raises(StageFailed, match="rows, tokens and trained tokens: found"):
            sft.check_nothing_lost(given, lossy, plain)


@pytest.mark.slow
def test_another_process_and_folder_give_the_same_bytes(tmp_path: Path, base: Input, elsewhere: Elsewhere) -> None:
    here = request_for(tmp_path / "here", base, lora={"r": 4, "lora_dropout": 0.1})
    result, _ = run_program(here)
    there = request_for(tmp_path / "there" / "deeper", base, lora={"r": 4, "lora_dropout": 0.1})
    elsewhere.run(there)
    assert json.loads((there.work / "result.json").read_text())["metrics"] == json.loads(result.model_dump_json())["metrics"]
    assert payload_digest(there) == payload_digest(here)
