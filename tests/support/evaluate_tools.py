"""Requests, adapters and benchmarks for tests of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import tokenizer
from program_tools import make_request, run_program
from transformers import AutoModelForCausalLM

from tasks.data.rows import SPLITS, Row, write_rows
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request

CONFIG: dict[str, Any] = {"kind": "evaluate", "model": "base", "datasets": ["data"], "max_new_tokens": 12}


def chat(i: int, answer: str) -> Row:
    messages = ({"role": "user", "content": f"What is {i} times {'one ' * (i % 4)}{i}?"}, {"role": "assistant", "content": answer})
    return Row(source="s", messages=messages, id=f"chat{i}")


CHATS = [chat(i, f'{{"product": {i * i}, "of": "{i}"}}') for i in range(7)]


def save_adapter(base: Input, folder: Path, trained: bool = True) -> Input:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Input(path=folder, digest="a" * 64, type="Adapter", template=base.template, base=base)


def request_for(folder: Path, model: Input, *datasets: list[Row], files: dict[str, list[Path]] | None = None, **fields: Any) -> Request:
    inputs = {"model": model}
    for i, rows in enumerate(datasets):
        payload = folder / f"data{i}"
        payload.mkdir(parents=True)
        for split in SPLITS:
            write_rows(rows if split == "test" else [], payload / f"{split}.parquet")
        inputs[f"datasets.{i}"] = Input(path=payload, digest="d" * 64, type="Dataset")
    config = {**CONFIG, "datasets": [f"data{i}" for i in range(len(datasets))], **fields}
    return make_request(folder, config, inputs, files=files or {})


def samples(request: Request) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (request.meta / "samples.jsonl").read_text(encoding="utf-8").strip().split("\n")]


def fails(request: Request, failure_class: str, match: str) -> StageFailed:
    with pytest.raises(StageFailed, match=match) as failure:
        run_program(request)
    assert failure.value.failure_class == failure_class
    return failure.value


def own_benchmarks(folder: Path) -> dict[str, list[Path]]:
    """Two tasks and their group, their data beside them."""
    folder.mkdir()
    questions = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(8)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    common = "dataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\ntest_split: test\ndoc_to_text: '{{question}}'\n"
    (folder / "even.yaml").write_text(
        f"task: even\n{common}output_type: multiple_choice\ndoc_to_choice: '{{{{choices}}}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    (folder / "said.yaml").write_text(
        f"task: said\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[answer]}}}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 5, do_sample: false}\n"
        "filter_list: [{name: first, filter: [{function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    (folder / "both.yaml").write_text(
        "group: both\ntask: [even]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n", encoding="utf-8"
    )
    return {"include_path": [folder]}
