"""Padding of prompts: models that take it in as text answer one row at a time, and compute the beginning of each row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_table import Trial, save
from lm_eval.api.instance import Instance
from pico import tokenizer
from program_tools import make_request, run_program
from sft_tools import chat, request_for

from tasks.data.thoughts import written
from tasks.evaluation import prefixes
from tasks.evaluation.harness import LanguageModel
from tasks.evaluation.sharing import Share
from tasks.models.padding import padding_matters
from tasks.training.frequencies import check_frequencies
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events, Input

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("model_type", "matters", "shares"),
    [
        ("llama", False, True),
        ("gpt2", False, True),
        ("mamba", False, False),
        ("rwkv", True, False),
        ("recurrent_gemma", False, False),
        ("openai-gpt", True, False),
        ("gemma3_text", False, False),
        ("gpt_neo", False, False),
    ],
)
def test_whose_states_and_positions_take_it_in(tmp_path: Path, model_type: str, matters: bool, shares: bool) -> None:
    from transformers import AutoModelForCausalLM

    save(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert padding_matters(model, PROMPT, 2) is matters
    assert prefixes.suits(model, PROMPT, 2) is shares


def test_frequencies_that_depend_on_the_longest_row_of_a_batch(tmp_path: Path) -> None:
    """Phi-3's: short rows would get those of long ones, and beginnings computed before others than the rest."""
    from transformers import AutoModelForCausalLM

    factors: dict[str, Any] = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    save(tmp_path / "model", "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    lm = LanguageModel(model, tokenizer(), 3, 0, Events(tmp_path / "events.jsonl"), Share())
    lm.check_generation(PROMPT)
    assert not lm.shares_beginnings
    requests: list[Any] = [(None, list(range(40, 40 + length)), [7, 8, 9]) for length in (20, 100, 30)]
    scores = [score for score, _ in lm._loglikelihood_tokens(requests)]
    for score, (_, context, answer) in zip(scores, requests, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([context + answer[:-1]])).logits[0].log_softmax(-1)
        assert score == pytest.approx(float(logits[-3:].gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-5)

    texts = ["the word by the river " * count for count in (4, 9, 11)]  # the last two cross the border while they are answered
    found = lm.write([Instance("generate_until", {}, (text, {"do_sample": False, "max_gen_toks": 16, "until": []}), 0) for text in texts])
    for answer, text in zip(found, texts, strict=True):
        ids = tokenizer()(text, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=16, do_sample=False, use_cache=False)[0, ids["input_ids"].shape[1] :]
        assert answer == written(new.tolist(), tokenizer(), lm.ends)


def test_trainings_whose_micro_batches_would_decide_about_frequencies_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    factors: dict[str, Any] = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 40}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    save(tmp_path / "model", "phi3", rope_parameters=rope, original_max_position_embeddings=40)
    base = Input(path=tmp_path / "model", digest="b" * 64, type="Model")
    rows, message = [chat(i, turns) for i, turns in enumerate((1, 4, 1, 4))], "the longest row would decide for all"
    pairs = [replace(row, rejected={"role": "assistant", "content": "No."}) for row in rows]
    refused = {
        "sft": request_for(tmp_path / "sft", base, rows),
        "packed": request_for(tmp_path / "packed", base, rows, packing=True),
        "dpo": request_for(tmp_path / "dpo", base, pairs, kind="dpo", resources={"micro_batch_size": 1}),
    }
    hints = {}
    for name, request in refused.items():
        with pytest.raises(StageFailed, match=message) as failed:
            run_program(request)
        hints[name] = failed.value.hint
    assert "micro_batch_size: 1" in hints["sft"]
    assert "packing: false" in hints["packed"]
    assert all("`max_length: 40` in the dataset stage" in hint for hint in hints.values())
    run_program(request_for(tmp_path / "alone", base, rows, resources={"micro_batch_size": 1}))
    run_program(request_for(tmp_path / "short", base, rows[::2]))
    model = AutoModelForCausalLM.from_pretrained(base.path)
    check_frequencies(model, [41, 60], "")
    with pytest.raises(StageFailed, match=message):  # as grpo asks: prompts, and the longest completion
        check_frequencies(model, [20, 30, 41], "lower max_completion_length")


@pytest.mark.parametrize("model_type", ["rwkv", "recurrent_gemma"])
def test_answers_do_not_depend_on_the_batch(tmp_path: Path, model_type: str) -> None:
    trial = Trial(tmp_path, model_type)
    answers: list[list[Any]] = []
    for size in (1, 6):
        config = {"kind": "evaluate", "model": "base", "datasets": ["data"], "max_new_tokens": 8, "resources": {"micro_batch_size": size}}
        request = make_request(tmp_path / f"by{size}", config, {"model": trial.base, "datasets.0": trial.data})
        _, events = run_program(request)
        samples = [json.loads(line) for line in (request.meta / "samples.jsonl").read_text().split("\n") if line]
        answers.append([(sample["id"], sample["answer"]) for sample in samples])
        messages = [event["message"] for event in events if event["type"] == "warning"]
        assert any("one by one" in message for message in messages) == (model_type == "rwkv")
    assert answers[0] == answers[1]
