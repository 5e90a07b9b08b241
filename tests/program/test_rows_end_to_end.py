"""Rows as people write them, under other people's templates, through dataset, sft, merge, evaluate and grpo on pico models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_tools import build_rows
from grpo_tools import SMALL as GRPO
from pico import save_pico, tokenizer
from program_tools import make_request, run_program
from template_table import said
from template_tools import ASK, CHANNELED, ENDS_WHOLE, THINKS_LAST, TURN
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.data.rows import read_split
from tasks.models.loading import template_hash
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request

END, OTHER = "<|im_end|>", "<|endoftext|>"
# As many people's templates write tools and calls.
DUMPS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + TURN.replace("{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}")
    + ASK
)
NOUNS = {"owl": "an animal", "fox": "an animal", "oak": "a plant", "rose": "a plant"}
ADJECTIVES = ("red", "old", "shy", "wet")
SCHEMAS = [
    {
        "type": "function",
        "function": {"name": name, "description": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}},
    }
    for name, key in (("set_alarm", "time"), ("play", "song"))
]


def animals(**thought: str) -> list[dict[str, Any]]:
    asked = [
        (f"What is the {adjective} {noun} no {i}?", kind) for i in range(8) for adjective in ADJECTIVES for noun, kind in NOUNS.items()
    ]
    return [{"messages": [said("user", question), said("assistant", answer, **thought)]} for question, answer in asked]


def calls() -> list[dict[str, Any]]:
    kinds = {"wake": ("set_alarm", {"time": "7:30"}), "play": ("play", {"song": "x"})}
    rows = []
    for i in range(40):
        for verb, (name, arguments) in kinds.items():
            call = {"type": "function", "function": {"name": name, "arguments": arguments}}
            messages = [said("user", f"Please {verb} number {i}"), {"role": "assistant", "content": None, "tool_calls": [call]}]
            rows.append({"messages": messages, "tools": SCHEMAS})
    return rows


class Line:
    """The stages of a pipeline on one base model, in one folder."""

    def __init__(self, folder: Path, template: str, eos: str = END):
        self.folder, words = folder, tokenizer()
        words.chat_template, words.eos_token = template, eos
        model = AutoModelForCausalLM.from_pretrained(save_pico(folder / "base", tied=False))  # tied, the head of the padding token is zero
        model.generation_config.eos_token_id = model.config.eos_token_id = words.eos_token_id
        model.save_pretrained(folder / "base")
        words.save_pretrained(folder / "base")
        self.base = Input(path=folder / "base", digest="b" * 64, type="Model", template=template_hash(words))

    def dataset(self, records: list[dict[str, Any]], **fields: Any) -> Input:
        built = build_rows(self.folder, records, model=self.base, **{"split": {"test": 0.2}, **fields})
        return Input(path=built.request.payload, digest="d" * 64, type="Dataset")

    def stage(self, name: str, config: dict[str, Any], inputs: dict[str, Input]) -> tuple[Request, dict[str, float]]:
        request = make_request(self.folder / name, config, inputs)
        return request, run_program(request)[0].metrics

    def sft(self, data: Input, **fields: Any) -> Input:
        config = {"kind": "sft", "model": "base", "dataset": "data", "global_batch_size": 16, **fields}
        request, _ = self.stage("sft", config, {"model": self.base, "dataset": data})
        whole = fields.get("method") == "full"
        words = AutoTokenizer.from_pretrained(request.payload)
        given = {"type": "Model"} if whole else {"type": "Adapter", "base": self.base}
        return Input(path=request.payload, digest="a" * 64, template=template_hash(words), **given)

    def evaluate(self, model: Input, data: Input, name: str = "evaluate", **fields: Any) -> dict[str, float]:
        config = {"kind": "evaluate", "model": "trained", "datasets": ["data"], "max_new_tokens": 32, "limit": 20, **fields}
        return self.stage(name, config, {"model": model, "datasets.0": data})[1]


FULL = {"method": "full", "learning_rate": 1e-2, "max_steps": 30}
LORA = {"learning_rate": 1e-2, "max_steps": 40, "lora": {"r": 16, "lora_alpha": 32}}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [LORA, pytest.param(FULL, marks=pytest.mark.full)], ids=["lora", "full"])
def test_answers_end_in_our_evaluation_and_in_plain_transformers_whatever_eos_is(tmp_path: Path, fields: dict[str, Any]) -> None:
    line = Line(tmp_path, TURN + ASK, eos=OTHER)
    data = line.dataset(animals())
    model = line.sft(data, **fields)
    if model.type == "Adapter":
        request, _ = line.stage("merge", {"kind": "merge", "adapters": ["sft"]}, {"adapters.0": model})
        model = model.model_copy(update={"path": request.payload, "type": "Model", "base": None})
    metrics = line.evaluate(model, data)
    assert metrics["dataset0/exact_match"] > 0.8
    assert metrics["dataset0/stopped"] > 0.8

    words, plain = AutoTokenizer.from_pretrained(model.path), AutoModelForCausalLM.from_pretrained(model.path)
    row = read_split(data.path, "test")[0]
    assert row.messages is not None
    prompt = words.apply_chat_template([row.messages[0]], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    ids = plain.generate(prompt, max_new_tokens=32)[0, prompt.shape[1] :].tolist()  # with its defaults
    assert words.decode(ids) == f"{row.messages[1]['content']}{END}"


@pytest.mark.slow
def test_calls_are_learnt_and_compared_where_the_template_writes_them(tmp_path: Path) -> None:
    line = Line(tmp_path, DUMPS)
    data = line.dataset(calls())
    model = line.sft(data, **FULL | {"global_batch_size": 8})
    assert line.evaluate(model, data)["dataset0/exact_match"] > 0.8
    assert line.evaluate(line.base, data, "before", limit=4)["dataset0/exact_match"] < 0.1


def test_calls_are_refused_where_the_template_leaves_them_out(tmp_path: Path) -> None:
    """By the dataset, by a training on rows of a dataset without a model, and by an evaluation."""
    line = Line(tmp_path, TURN + ASK)
    lost = r"leaves out .*messages\[1\]\.tool_calls\[0\]\.name"
    with pytest.raises(StageFailed, match=rf"data\.jsonl:1: the chat template .* {lost}"):
        line.dataset(calls())
    built = build_rows(tmp_path, calls(), split={"test": 0.2})
    data = Input(path=built.request.payload, digest="d" * 64, type="Dataset")
    with pytest.raises(StageFailed, match=lost):
        line.sft(data, **FULL)
    with pytest.raises(StageFailed, match=lost):
        line.evaluate(line.base, data)
    with pytest.raises(StageFailed, match="no test row of data has an answer to compare with"):
        line.evaluate(line.base, data, "kept", on_unrendered="keep")


@pytest.mark.slow
def test_thoughts_in_a_channel_are_learnt_and_count_neither_for_evaluations_nor_for_rewards(tmp_path: Path) -> None:
    line = Line(tmp_path, CHANNELED)
    data = line.dataset(animals(reasoning_content="One of two."))
    model = line.sft(data, **FULL)
    assert line.evaluate(model, data)["dataset0/exact_match"] > 0.8
    samples = (tmp_path / "evaluate" / "out" / "meta" / "samples.jsonl").read_text(encoding="utf-8")
    assert "<file_sep>analysis<repo_name>One of two.<gh_stars><|im_start|>assistant<file_sep>final<repo_name>a" in samples
    assert line.evaluate(model, data, "cut", max_new_tokens=6)["dataset0/exact_match"] == 0.0  # while it thinks

    grpo = {**GRPO, "max_steps": 1, "global_batch_size": 16, "max_completion_length": 32, "temperature": 1.1}
    request, rewarded = line.stage("grpo", grpo, {"model": model, "dataset": data})
    assert rewarded["reward/exact_match"] > 0.4
    rollouts = [json.loads(rollout) for rollout in (request.meta / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {rollout["answer"] for rollout in rollouts} <= set(NOUNS.values())
    assert any(rollout["completion"].startswith("analysis") for rollout in rollouts)  # the whole of it


THREE = [{"messages": [said(role, f"{turn}{i}") for turn in "abc" for role in ("user", "assistant")]} for i in range(8)]
NEWLINES = [{"messages": [said("user", f"Q {i}"), said("assistant", f"{'' if i % 4 else chr(10) * 2}Answer {i}")]} for i in range(8)]
GREETED = [
    {"conversations": [{"from": who, "value": what} for who, what in (("gpt", "Hello?"), ("human", f"Sum {i}"), ("gpt", f"It is {i}"))]}
    for i in range(8)
]


@pytest.mark.parametrize(
    ("template", "records", "answers"),
    [
        (THINKS_LAST, THREE, 3),
        pytest.param(ENDS_WHOLE, THREE, 3, marks=pytest.mark.full),
        (TURN + ASK, NEWLINES, 1),
        pytest.param(TURN + ASK, GREETED, 1, marks=pytest.mark.full),
    ],
    ids=["three turns, thinks last", "three turns, ends whole", "line ends first", "greeting first"],
)
def test_files_that_were_refused_are_trained(tmp_path: Path, template: str, records: list[dict[str, Any]], answers: int) -> None:
    line = Line(tmp_path, template)
    data = line.dataset(records, split={"test": 0})
    config = {"kind": "sft", "model": "base", "dataset": "data", "global_batch_size": len(records) * answers, "num_train_epochs": 1}
    _, metrics = line.stage("sft", config, {"model": line.base, "dataset": data})
    assert metrics["steps"] == 1  # a sequence for each answer, or one for all of them
    ends = tokenizer()(END, add_special_tokens=False)["input_ids"]
    assert metrics["trained_tokens"] > len(records) * answers * len(ends)
    assert torch.isfinite(torch.tensor(metrics["loss"]))
