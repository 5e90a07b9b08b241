"""The dpo program on pico models: what it learns, what it hands over, and that no micro-batch or kill changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_tools import request_for as evaluation
from pico import tokenizer
from preference_tools import OTHER_PAIRS, PAIRS, SMALL, curve, pair, request_for
from process_tools import finish, kill_at
from program_tools import payload_digest, run_program, run_until
from safetensors.torch import load_file
from sft_tools import chat
from sft_tools import request_for as sft_request
from transformers import AutoModelForCausalLM

from tasks.data.masks import prompt_and_answer
from tasks.models.loading import template_hash
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request

STEP = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "rows")


def adapter_of(request: Request, base: Input) -> Input:
    return Input(path=request.payload, digest="a" * 64, type="Adapter", template=template_hash(tokenizer()), base=base)


def preferred(folder: Path, model: Input) -> float:
    request = evaluation(folder, model, [pair(i) for i in range(100, 130)], max_new_tokens=1)
    result, _ = run_program(request)
    assert {"dataset0/preference_accuracy_norm", "dataset0/preference_accuracy_stderr", "dataset0/exact_match"} <= result.metrics.keys()
    return result.metrics["dataset0/preference_accuracy"]


def test_it_learns_which_answers_are_better_and_says_so_of_others(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path / "dpo", base, [pair(i) for i in range(40)], OTHER_PAIRS, max_steps=20, eval_steps=20, beta=0.05)
    result, events = run_program(request)
    margins = curve(request, "rewards/margins")
    assert margins[0] == 0
    assert margins[-1] > 1
    assert curve(request, "rewards/chosen")[-1] > curve(request, "rewards/rejected")[-1]
    assert result.metrics["eval_reward_accuracy"] > 0.9
    assert {"reward_margin", "reward_accuracy", "reward_chosen", "loss", "eval_loss"} <= {event.get("name") for event in events}
    plain = base.model_copy(update={"template": template_hash(tokenizer())})
    before, after = preferred(tmp_path / "before", plain), preferred(tmp_path / "after", adapter_of(request, plain))
    assert before < 0.8
    assert after > 0.9


@torch.no_grad()
def direct(model: Any, row: Any) -> list[float]:
    """Return the log-probabilities of a pair's answers, by transformers."""
    found = []
    for prompt, answer in (prompt_and_answer(each, tokenizer()) for each in row.alternatives()):
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        found.append(sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
    return found


def test_no_micro_batch_changes_losses_or_figures_and_they_are_those_of_the_definition(tmp_path: Path, base: Input) -> None:
    """Eleven pairs in steps of four: the last step of an epoch has three. The first step's figures are computed from the base's logits."""
    fields: dict[str, Any] = {"rpo_alpha": 0.5, "loss_type": "ipo", "validation": OTHER_PAIRS, "eval_steps": 3, "max_steps": 4}
    runs = {size: request_for(tmp_path / str(size), base, resources={"micro_batch_size": size}, **fields) for size in (4, 1)}
    for request in runs.values():
        run_program(request)
    for name in (*STEP, *(f"eval_{name}" for name in STEP[:-1])):
        assert curve(runs[1], name) == pytest.approx(curve(runs[4], name), rel=1e-3, abs=1e-4)
    assert curve(runs[1], "rows") == [4, 4, 3, 4]

    one = request_for(tmp_path / "one", base, PAIRS[:3], global_batch_size=3, max_steps=1, rpo_alpha=0.5)
    run_program(one)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    values = [direct(model, row) for row in PAIRS[:3]]
    tokens = sum(len(prompt_and_answer(row, tokenizer())[1]) for row in PAIRS[:3])
    assert curve(one, "logps/rejected")[0] == pytest.approx(sum(rejected for _, rejected in values) / 3, rel=1e-4)
    assert curve(one, "loss")[0] == pytest.approx(0.6931 - 0.5 * sum(chosen for chosen, _ in values) / tokens, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust", "apo_zero", "apo_down"])
def test_every_loss_is_the_same_in_two_processes(tmp_path: Path, base: Input, loss_type: str) -> None:
    """With rows that are repeated to fill up the last step of an epoch."""
    fields = {"loss_type": loss_type, "max_steps": 4, "validation": OTHER_PAIRS, "eval_steps": 3}
    fields |= {"label_smoothing": 0.1} if loss_type == "robust" else {}
    alone = request_for(tmp_path / "alone", base, **fields)
    run_program(alone)
    together = request_for(tmp_path / "together", base, resources={"processes": 2, "micro_batch_size": 1}, **fields)
    finish(together, 2)
    for name in (*STEP, *(f"eval_{name}" for name in STEP[:-1])):
        assert curve(together, name) == pytest.approx(curve(alone, name), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, base: Input) -> Input:
    request = sft_request(tmp_path_factory.mktemp("earlier") / "sft", base, max_steps=3)
    run_program(request)
    return adapter_of(request, base)


WAYS: dict[str, dict[str, Any]] = {
    "a new adapter": {},
    "an adapter": {},
    "qlora": {"method": "qlora"},
    "dora": {"lora": {"r": 4, "lora_alpha": 8, "use_dora": True}},
    "full": {"method": "full", "learning_rate": 1e-3},
    "vera": {"vera": {"r": 32}, "learning_rate": 5e-2},
    "oft": {"oft": {"oft_block_size": 16}},
    "ia3": {"ia3": {}, "learning_rate": 5e-2},
    "modules": {"lora": {"r": 4, "lora_alpha": 8, "modules_to_save": ["model.norm"]}},
    "lora+": {"lora": {"r": 4, "lora_alpha": 8, "lora_plus_ratio": 8}, "learning_rate": 1e-3},
}
NOT_LORA = {"full", "vera", "oft", "ia3"}


@pytest.mark.parametrize("way", ["an adapter", *(pytest.param(way, marks=pytest.mark.full) for way in WAYS if way != "an adapter")])
def test_killed_it_ends_bit_for_bit_as_undisturbed(
    tmp_path: Path, base: Input, earlier: Input, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stays what it was before the training, not the checkpoint that it resumes from."""
    if way in NOT_LORA:
        monkeypatch.delitem(SMALL, "lora")
    fields = WAYS[way] | {"adapter": earlier if way == "an adapter" else None, "resources": {"checkpoint_steps": 2}, "max_steps": 5}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    run_until(killed, 4)
    assert run_program(killed)[0].metrics == expected.metrics
    assert payload_digest(killed) == payload_digest(whole)
    assert curve(whole, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    if way == "an adapter":
        assert set(load_file(whole.payload / "adapter_model.safetensors")) == set(load_file(earlier.path / "adapter_model.safetensors"))
        assert expected.metrics["all_parameters"] == 703040


@pytest.mark.full
@pytest.mark.parametrize("way", ["vera", "oft", "ia3", "modules"])
def test_adapters_of_every_kind_are_continued_beside_a_frozen_copy(
    tmp_path: Path, base: Input, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL does not copy the vectors of VeRA and (IA)^3, so that the reference was another model than the one that begins."""
    first = sft_request(tmp_path / "sft", base, max_steps=3, **WAYS[way])
    run_program(first)
    if way in NOT_LORA:
        monkeypatch.delitem(SMALL, "lora")
    request = request_for(tmp_path / "dpo", base, adapter=adapter_of(first, base), max_steps=3, **WAYS[way])
    result, _ = run_program(request)
    assert curve(request, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    before, after = (load_file(each.payload / "adapter_model.safetensors") for each in (first, request))
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-4 for name in before)
    assert result.metrics["trainable_parameters"] < result.metrics["all_parameters"] < 720_000


@pytest.mark.full
def test_killed_with_9_it_ends_as_undisturbed(tmp_path: Path, base: Input) -> None:
    whole, killed = (request_for(tmp_path / name, base, resources={"checkpoint_steps": 2}) for name in ("whole", "killed"))
    run_program(whole)
    kill_at(killed, 4)
    finish(killed)
    assert payload_digest(killed) == payload_digest(whole)


def test_a_reference_that_is_not_the_model_before_is_noticed(
    tmp_path: Path, base: Input, earlier: Input, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the base alone were the reference of an adapter that is continued."""
    from trl.trainer import dpo_trainer

    kept = dpo_trainer.use_adapter
    monkeypatch.setattr(dpo_trainer, "use_adapter", lambda model, adapter_name: kept(model, None))
    with pytest.raises(StageFailed, match="the reference is not the model before the training: found log-probabilities of"):
        run_program(request_for(tmp_path, base, adapter=earlier))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no rejected answer": (
        lambda: [*PAIRS, replace(chat(1), source="sources.1")],
        {},
        r"1 of 12 train rows have no rejected answer, first row row1 of sources\.1",
    ),
    "too long": (lambda: PAIRS, {"max_length": 24}, r"\d+ of 11 train rows are longer than max_length 24: row row\d+ has \d+ tokens"),
    "the same tokens": (
        lambda: [replace(PAIRS[0], rejected={**PAIRS[0].messages[-1], "name": "other"})],
        {},
        "row row0: the two answers have the same tokens",
    ),
    "no validation rows": (lambda: PAIRS, {"eval_steps": 2}, "the dataset has no rows in its validation split"),
    "a special token": (
        lambda: [replace(PAIRS[0], rejected={"role": "assistant", "content": "<|im_end|>"})],
        {},
        "row row0: found the special token <|im_end|>",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_rows_that_it_cannot_compare_are_refused(tmp_path: Path, base: Input, fault: str) -> None:
    rows, fields, message = REFUSED[fault]
    with pytest.raises(StageFailed, match=message.replace("|im_end|", r"\|im_end\|")) as failure:
        run_program(request_for(tmp_path, base, rows(), **fields))
    assert failure.value.failure_class == "data"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (PAIRS, "11 of 11 train rows have a rejected answer beside the chosen one, first row row0"),
        ([chat(1), replace(chat(2), label=False)], "1 of 2 train rows have the label false, first row row2"),
    ],
)
def test_sft_learns_no_rejected_or_unwanted_answer(tmp_path: Path, base: Input, rows: Any, message: str) -> None:
    with pytest.raises(StageFailed, match=message):
        run_program(sft_request(tmp_path, base, rows))
