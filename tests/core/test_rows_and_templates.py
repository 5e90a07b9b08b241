"""Messages of `validate` about templates, answers to train on, and the mixing of sources; what of it is in the keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.model import ModelStage
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.keys import key_document

FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base: {{kind: model, path: m{base}}}
      data: {{kind: dataset, sources: [{{type: files, path: a.jsonl{first}}}, {{type: files, path: b.jsonl{second}}}]}}
      sft:  {{kind: sft, model: base, dataset: data{sft}}}
      eval: {{kind: evaluate, model: base{eval}}}
"""
GOOD = {"base": "", "first": "", "second": "", "sft": "", "eval": ", datasets: [data]"}
LAST = "\n\nhint: write `{last: 2}`"
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "reserved argument": (
        {"base": ", chat_template_kwargs: {messages: x}"},
        "demo.base.chat_template_kwargs.messages: found `messages`, which every rendering sets itself\n\nhint: remove it",
    ),
    "special token": (
        {"base": ", chat_template_kwargs: {eos_token: x}"},
        "demo.base.chat_template_kwargs.eos_token: found `eos_token`, which every rendering sets itself\n\nhint: remove it",
    ),
    "no argument's name": (
        {"base": ", chat_template_kwargs: {'a-b': 1}"},
        "demo.base.chat_template_kwargs.a-b: found `a-b`, expected the name of an argument: letters, digits and underscores",
    ),
    "false as text": (
        {"base": ", chat_template_kwargs: {enable_thinking: 'false'}"},
        "demo.base.chat_template_kwargs.enable_thinking: found the text 'false', which templates take for true, expected true or false\n\n"
        "hint: remove the quotes",
    ),
    "arguments as text": (
        {"base": ", chat_template_kwargs: enable_thinking"},
        "demo.base.chat_template_kwargs: found 'enable_thinking', expected a mapping\n\nhint: write `{enable_thinking: false}`",
    ),
    "template of another tool": (
        {"base": ", template: qwen"},
        "demo.base.template: found the unknown field `template`, expected a field of model\n\nhint: write `chat_template: FILE`, a Jinja"
        " template, or remove it: the model's own is used",
    ),
    "last as text": (
        {"sft": ", train_on: last_2"},
        f"demo.sft.train_on: found 'last_2', expected completion, assistant, all or a mapping{LAST}",
    ),
    "last as a number": ({"sft": ", train_on: 2"}, f"demo.sft.train_on: found 2, expected completion, assistant, all or a mapping{LAST}"),
    "last one": ({"sft": ", train_on: {last: 1}"}, "demo.sft.train_on.last: found 1, expected at least 2"),
    "last misspelled": (
        {"sft": ", train_on: {lats: 2, last: 2}"},
        "demo.sft.train_on.lats: found the unknown field `lats`, expected last\n\nhint: did you mean `last`?",
    ),
    "stop without datasets": (
        {"eval": ", benchmarks: [arc_easy], stop: [x]"},
        "demo.eval.stop: found stop without datasets: it has no effect\n\nhint: remove it",
    ),
    "empty stop": (
        {"eval": ", datasets: [data], stop: ['']"},
        "demo.eval.stop.0: found '', expected text that is not empty",
    ),
    "some weights": (
        {"first": ", weight: 1"},
        "demo.data.sources.1: found no weight, expected one: other sources have weights\n\nhint: add `weight: 1.0`, or remove the others",
    ),
    "weights and repeat": (
        {"first": ", weight: 1", "second": ", weight: 2, repeat: 3"},
        "demo.data.sources.1.repeat: found repeat in a stage whose sources have weights, which already say how often rows are repeated\n\n"
        "hint: remove it, or the weights",
    ),
    "no weight": ({"first": ", weight: 0"}, "demo.data.sources.0.weight: found 0, expected above 0"),
    "no rows": ({"first": ", max_rows: 0"}, "demo.data.sources.0.max_rows: found 0, expected at least 1"),
    "samples": (
        {"first": ", max_samples: 3"},
        "demo.data.sources.0.max_samples: found the unknown field `max_samples`, expected a field of `sources`\n\nhint: write `max_rows`",
    ),
    "repeat for grpo": (
        {"first": ", repeat: 2", "sft": "}\n      rl: {kind: grpo, model: base, dataset: data, rewards: [{type: exact_match}]"},
        "demo.rl.dataset: found `data`, whose sources have repeat or weight, but grpo asks each prompt once per epoch\n\n"
        "hint: use `max_rows` in its sources",
    ),
}


def checked(folder: Path, **fields: str) -> None:
    (folder / "p.yaml").write_text(FILE.format(**GOOD | fields))
    load(folder / "p.yaml")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    fields, expected = REFUSED[name]
    with pytest.raises(ConfigError) as failure:
        checked(tmp_path, **fields)
    assert str(failure.value).partition(": ")[2] == expected


def test_the_weight_of_an_only_source_is_refused() -> None:
    stage = DatasetStage(kind="dataset", sources=({"type": "files", "path": "a", "weight": 2},))  # type: ignore[arg-type]
    assert [problem.field for problem in stage.problems()] == ["sources.0.weight"]


def test_accepted(tmp_path: Path) -> None:
    kwargs = "{enable_thinking: false, effort: high, n: 3}"
    checked(tmp_path, base=f", chat_template: x.jinja, chat_template_kwargs: {kwargs}", sft=", train_on: {last: 3}")
    checked(tmp_path, first=", weight: 1, system: Hi", second=", weight: 0.5, max_rows: 3", eval=", datasets: [data], stop: ['\\n']")


def test_defaults_are_in_no_key_and_what_differs_is() -> None:
    def key(of: type[ProgramStage], **fields: Any) -> dict[str, Any]:
        return key_document(of.model_validate(fields), 1, {})["config"]

    model, data = {"kind": "model", "path": "m"}, {"kind": "dataset", "sources": [{"type": "files", "path": "a"}]}
    sft, score = {"kind": "sft", "model": "m", "dataset": "d"}, {"kind": "evaluate", "model": "m", "datasets": ["d"]}
    same: list[tuple[type[ProgramStage], dict[str, Any], dict[str, Any]]] = [
        (ModelStage, model, {"chat_template_kwargs": {}}),
        (DatasetStage, data, {"sources": [{"type": "files", "path": "a", "repeat": 1}]}),
        (SftStage, sft, {"train_on": "assistant"}),
        (EvaluateStage, score, {"stop": []}),
    ]
    for kind, fields, more in same:
        assert key(kind, **fields) == key(kind, **fields | more)
    differs: list[tuple[type[ProgramStage], dict[str, Any], dict[str, Any]]] = [
        (ModelStage, model, {"chat_template_kwargs": {"enable_thinking": False}}),
        *(
            (DatasetStage, data, {"sources": [{"type": "files", "path": "a", **more}]})
            for more in ({"repeat": 2}, {"max_rows": 1}, {"system": ""})
        ),
        (SftStage, sft, {"train_on": {"last": 2}}),
        (EvaluateStage, score, {"stop": ["x"]}),
    ]
    for kind, fields, more in differs:
        assert key(kind, **fields) != key(kind, **fields | more)
