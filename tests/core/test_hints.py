"""Hints for people who come from LLaMA-Factory, axolotl or ms-swift, and for YAML whose indentation or brackets do not fit."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from load_tools import GOOD, load_text
from pydantic import BaseModel

from tuneline.config.aliases import FIELD_ALIASES
from tuneline.config.other_tools import ABSENT_KINDS, FOREIGN, OTHER_VALUES
from tuneline.config.spec import STAGES, Pipeline, Spec
from tuneline.errors import ConfigError, Problem
from tuneline.kinds.adapters import Lora
from tuneline.kinds.dataset import Split
from tuneline.kinds.gate import Requirement
from tuneline.kinds.sources import SOURCES
from tuneline.kinds.stage import Resources

BLOCK = """\
version: 1
pipelines:
  demo:
    stages:
      base:
        kind: model
        path: models/base
      data: {kind: dataset, sources: [{type: files, path: rows.jsonl}]}
      sft:
        kind: sft
        model: base
        dataset: data
"""
LISTED = "data: {kind: dataset, sources: [{type: files, path: rows.jsonl}]}"
IN_BLOCKS = "data:\n        kind: dataset\n        sources:\n        - type: files\n          path: a.jsonl"


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError, match="found") as caught:
        load_text(text)
    return caught.value.problems


FILES = {
    "LLaMA-Factory": ("model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ncutoff_len: 2048\nbf16: true\n", "finetuning_type, cutoff_len"),
    "axolotl": ("base_model: m\nsequence_len: 2048\nmicro_batch_size: 2\ndatasets: [{path: a, type: alpaca}]\nadapter: lora\n", "base_model, sequence_len"),
    "ms-swift": ("model: m\ntrain_type: lora\ndataset: [a]\nlora_rank: 8\n", "train_type, model"),
    "TRL": ("model_name_or_path: m\ndataset_name: a/b\nuse_peft: true\nlora_r: 8\n", "dataset_name, use_peft"),
    "mergekit": ("merge_method: ties\nmodels: []\nbase_model: m\n", "merge_method, models"),
}  # fmt: skip


@pytest.mark.parametrize("tool", FILES)
def test_a_file_of_another_tool_is_one_problem(tool: str) -> None:
    text, keys = FILES[tool]
    found = f"found a configuration of {tool} ({keys}), expected a tuneline file with `pipelines:`"
    hint = "`tuneline import p.yaml` translates it"
    if tool == "mergekit":
        hint = "`tuneline init` writes a file to start from; docs/coming-from.md lists the fields"
    assert problems(text) == (Problem("", found, hint, place="p.yaml:1:1"),)


def test_a_file_of_tuneline_without_pipelines_is_no_file_of_another_tool() -> None:
    assert [problem.field for problem in problems("version: 1\nvars: {a: 1}\nstages: {}\n")] == ["pipelines", "vars.a", "stages"]
    assert all(len(keys) == len(set(keys)) for keys in FOREIGN.values())


OWNERS: dict[str, type[BaseModel]] = {
    each.__name__: each
    for stage in (*STAGES.values(), *SOURCES.values(), Resources, Lora, Split, Requirement, Pipeline, Spec)
    for each in stage.__mro__
    if issubclass(each, BaseModel)
}


@pytest.mark.parametrize("owner", FIELD_ALIASES)
def test_aliases_are_no_fields_and_name_fields_that_exist(owner: str) -> None:
    fields = OWNERS[owner].model_fields
    assert not FIELD_ALIASES[owner].keys() & fields.keys()
    below = {name for each in OWNERS.values() for name in each.model_fields} | {"validation", "max_num_seqs", "weight", "cron"}
    for hint in FIELD_ALIASES[owner].values():
        written = re.match(r"write `(\w+)", hint)
        assert not written or written[1] in (fields if issubclass(OWNERS[owner], Spec | Pipeline) else below), hint


def test_other_values_and_kinds_are_none_of_ours() -> None:
    assert not ABSENT_KINDS.keys() & STAGES.keys()
    assert not ABSENT_KINDS.keys() & {name for stage in STAGES.values() for name in stage.also_called}
    fields = [field for stage in (*STAGES.values(), *SOURCES.values(), Resources) for field in stage.model_fields.items()]
    for name, value in OTHER_VALUES:
        assert [field for field, info in fields if field == name and f"'{value}'" not in str(info.annotation)], (name, value)


TRAINING = {
    "val_size": "write `split: {validation: 0.1}` in the stage of kind `dataset`",
    "save_steps": "write `resources: {checkpoint_steps: 50}`: a checkpoint every 50 steps",
    "logging_steps": "remove it: every step is logged",
    "warmup_ratio": "write `warmup_steps: 0.1`: a value below 1 is a share of all steps",
    "warmup-ratio": "write `warmup_steps: 0.1`: a value below 1 is a share of all steps",
    "output_dir": "remove it: artifacts, checkpoints and logs are in the store; `tuneline show` prints their folders",
    "template": "remove it: the model's own chat template is used; another one is a file, `chat_template:` in the stage of kind `model`",
    "model_name_or_path": "write `model:` with the name of a stage of kind `model`, which has `hub:` or `path:`",
    "bf16": "write `dtype: bfloat16`, the default on GPUs",
    "load_in_4bit": "write `method: qlora` and `bits: 4`",
    "deepspeed": "write `resources: {strategy: zero3}` (or zero1, zero2); tuneline writes DeepSpeed's configuration",
    "gradient_checkpointing": "write it under `resources:`",
    "sample_packing": "write `packing: true`",
    "micro_batch_size": "write it under `resources:`",
    "save_total_limit": "write `resources: {checkpoints_kept: 2}`",
    "lora_alpha": "write it under `lora:`",
    "use_dora": "write it under `lora:`",
    "neftune_alpha": "write `neftune_noise_alpha: 5`",
    "enable_liger_kernel": "write `resources: {kernels: liger}`",
    "attn_implementation": "write it under `resources:`",
    "optimizer": "write `optim: adamw`, or adamw_8bit, adafactor, lion, muon",
    "load_best_model_at_end": "write `save_best: true` with `eval_steps`; `early_stopping: {patience: 3}` keeps the best as well, and stops",
    "datasets": "rows come from a stage of kind `dataset`: name it in `dataset:`",
    "Lr": "write `learning_rate`",
}


def test_fields_of_other_tools_have_hints_of_their_own_and_no_list() -> None:
    text = GOOD.replace("global_batch_size: 8", ", ".join(f"{name}: 1" for name in TRAINING))
    found = problems(text)
    assert {problem.field.removeprefix("demo.sft."): problem.hint for problem in found} == TRAINING
    assert {problem.message.partition(", ")[2] for problem in found} == {"expected a field of sft"}


def test_the_fields_of_a_stage_are_listed_once() -> None:
    text = GOOD.replace("global_batch_size: 8", "foo: 1, bar: 2, learning_rte: 3, resources: {foo: 1, bar: 1}").replace(
        "kind: merge", "kind: merge, foo: 1"
    )
    messages = {problem.field: problem.message for problem in problems(text)}
    assert [field for field, message in messages.items() if "description" in message] == ["demo.sft.foo", "demo.merged.foo"]
    assert [field for field, message in messages.items() if "gpus" in message] == ["demo.sft.resources.foo"]
    assert messages["demo.sft.bar"] == "found the unknown field `bar`, expected a field of sft"


# fmt: off
HINTS: dict[str, tuple[str, str, str]] = {
    "adapter lora": ("global_batch_size: 8", "adapter: lora", "remove it: `method: lora` is the default; `adapter` names a stage whose adapter is trained further"),
    "adapter qlora": ("global_batch_size: 8", "adapter: qlora", "write `method: qlora`; `adapter` names a stage whose adapter is trained further"),
    "adapter path": ("global_batch_size: 8", "adapter: ./out", "name a training stage of this pipeline: tuneline reads no adapters from elsewhere"),
    "ipo": ("kind: sft", "kind: ipo", "write `dpo` (train on pairs of a chosen and a rejected answer)"),
    "simpo": ("kind: sft", "kind: SimPO", "tuneline has no preference training without a reference model; `dpo` trains on pairs of answers, `kto` on labeled ones"),
    "reward": ("kind: sft", "kind: reward_model", "tuneline trains no reward models yet; `grpo` takes reward functions under `rewards:`"),
    "ppo": ("kind: sft", "kind: ppo", "tuneline has none yet; its reinforcement learning is `grpo`, on reward functions instead of a reward model"),
    "finetune": ("kind: sft", "kind: fine-tune", "write `sft` (fine-tune a LoRA adapter or all weights on the dataset's answers) or `grpo` (train a LoRA adapter by reinforcement learning with verifiable rewards)"),
    "qlora": ("kind: sft", "kind: qlora", "write `sft` (fine-tune a LoRA adapter or all weights on the dataset's answers)"),
    "model hub": ("model: base", "model: meta-llama/Llama-3-8B", "add a stage `{kind: model, hub: meta-llama/Llama-3-8B}` and name it here"),
    "model address": ("model: base", "model: https://huggingface.co/a/b", "add a stage `{kind: model, hub: a/b}` and name it here"),
    "model path": ("model: base", "model: ./x", "add a stage `{kind: model, path: ./x}` and name it here"),
    "model absolute": ("model: base", "model: /models/x", "add a stage `{kind: model, path: /models/x}` and name it here"),
    "model folder": ("model: base", "model: models/x", "add a stage `{kind: model, path: models/x}` and name it here"),
    "model gguf": ("model: base", "model: x.gguf", "add a stage `{kind: model, gguf: x.gguf}` and name it here"),
    "evaluated hub": ("model: sft,", "model: a/b,", "add a stage `{kind: model, hub: a/b}` and name it here"),
    "dataset hub": ("dataset: data", "dataset: a/b", "add a stage `{kind: dataset, sources: [{type: hub, repo: a/b}]}` and name it here"),
    "dataset file": ("dataset: data", "dataset: a.jsonl", "add a stage `{kind: dataset, sources: [{type: files, path: a.jsonl}]}` and name it here"),
    "benchmark": ("datasets: [data]", "datasets: [data, arc_easy]", "for a benchmark of lm-eval, write `benchmarks: [arc_easy]`"),
    "hub of a path": ("path: models/base", "hub: ./x", "for a local folder, write `path: ./x`"),
    "hub address": ("path: models/base", "hub: https://huggingface.co/a/b/tree/main", "write `a/b`"),
    "repo of a file": ("type: files, path: rows.jsonl", "type: hub, repo: rows.jsonl", "for local files, write `{type: files, path: rows.jsonl}`"),
    "source file": ("[{type: files, path: rows.jsonl}]", "[sums.jsonl]", "write `{type: files, path: sums.jsonl}`"),
    "source hub": ("[{type: files, path: rows.jsonl}]", "[a/b]", "write `{type: hub, repo: a/b}`"),
    "sources text": ("[{type: files, path: rows.jsonl}]", "sums.jsonl", "write `[{type: files, path: sums.jsonl}]`"),
    "sources mapping": ("[{type: files, path: rows.jsonl}]", "{type: files, path: rows.jsonl}", "put it into a list: write `- ` before its first field, or `[` and `]` around it"),
    "type sharegpt": ("type: files", "type: sharegpt", "write `{type: files, format: sharegpt, path: rows.jsonl}`"),
    "type alpaca": ("type: files", "type: alpaca", "write `{type: files, format: alpaca, path: rows.jsonl}`"),
    "type json": ("type: files", "type: json", "write `{type: files, path: rows.jsonl}`"),
    "type chat_template": ("type: files", "type: chat_template", "write `{type: files, format: messages, path: rows.jsonl}`"),
    "format chat_template": ("path: rows.jsonl", "path: rows.jsonl, format: chat_template", "write `messages`"),
    "gate min": ("at_least: 0.5", "at_least: 0.5, min: 0.5", "write `at_least: 0.5`, or `at_most` for a maximum"),
    "gate max": ("at_least: 0.5", "at_least: 0.5, max: 0.5", "write `at_most: 0.5`"),
    "gate metric": ("at_least: 0.5", "at_least: 0.5, exact_match: 0.5", "write `metric: data/exact_match` and `at_least: 0.5`"),
    "evaluate tasks": ("datasets: [data]", "datasets: [data], tasks: [arc_easy]", "write `benchmarks: [arc_easy]`: names of lm-eval tasks"),
    "evaluate batch_size": ("datasets: [data]", "datasets: [data], batch_size: 8", "write `resources: {micro_batch_size: 16}`"),
    "dataset file_name": ("split: {test: 0.1}", "file_name: a.json", "write `sources: [{type: files, path: rows.jsonl}]`"),
    "dataset_info": ("split: {test: 0.1}", "dataset_info: a.json", "write `sources: [{type: files, path: rows.jsonl}]`; each source has its own format and columns"),
    "resources deepspeed": ("global_batch_size: 8", "resources: {deepspeed: ds_z3.json}", "write `strategy: zero3` (or zero1, zero2)"),
    "benchmarks with commas": ("datasets: [data]", "benchmarks: 'arc_easy,piqa'", "write `[arc_easy, piqa]`"),
}
# fmt: on


@pytest.mark.parametrize("case", HINTS)
def test_a_habit_from_another_tool_has_a_hint(case: str) -> None:
    old, new, hint = HINTS[case]
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    assert hint in [problem.hint for problem in problems(text)]


def test_a_missing_field_is_added_with_a_stage_that_exists() -> None:
    assert [problem.hint for problem in problems(GOOD.replace("model: base, dataset: data, ", ""))] == [
        "add `dataset: data`",
        "add `model: base`",
    ]
    renamed = GOOD.replace("data:  ", "rows:  ").replace("[data]", "[rows]").replace("calibration: data", "calibration: rows")
    assert "add `dataset: rows`" in [problem.hint for problem in problems(renamed.replace(", dataset: data", ""))]


def test_stages_as_a_list_have_the_form_of_a_mapping() -> None:
    text = "version: 1\npipelines:\n  demo:\n    stages:\n      - {name: base, kind: model}\n"
    assert [(problem.message, problem.hint) for problem in problems(text)] == [
        ("found a list, expected a mapping", "write `NAME: {kind: ...}`")
    ]


# fmt: off
SYNTAX: dict[str, tuple[str, str, str]] = {
    "deeper": ("        model: base", "          model: base", "p.yaml:11:11: found line 11 indented by 10 spaces, expected 8, as the other fields of `sft` (line 10)"),
    "deeper by one": ("        dataset: data", "         dataset: data", "p.yaml:12:10: found line 12 indented by 9 spaces, expected 8, as the other fields of `sft` (line 11)"),
    "less by one": ("        model: base", "       model: base", "p.yaml:11:8: found line 11 indented by 7 spaces, expected 8, as the other fields of `sft` (line 10)"),
    "a field beside its stage": ("        model: base", "      model: base", "p.yaml:11:7: found line 11 indented by 6 spaces, expected 8, as the other fields of `sft` (line 10)"),
    "a stage by one": ("      sft:", "     sft:", "p.yaml:9:6: found line 9 indented by 5 spaces, expected 6, as the other fields of `stages` (line 8)"),
    "a stage below another": ("      sft:", "        sft:", "p.yaml:9:9: found line 9 indented by 8 spaces, expected 6, as the other fields of `stages` (line 8)"),
    "a comment between": ("        model: base", "\n# comment\n          model: base", "p.yaml:13:11: found line 13 indented by 10 spaces, expected 8, as the other fields of `sft` (line 10)"),
    "an item": (LISTED, IN_BLOCKS + "\n         - type: files", "p.yaml:13:10: found line 13 indented by 9 spaces, expected 8, as the other items of `sources` (line 11)"),
    "a field of an item": (LISTED, IN_BLOCKS + "\n           format: text", "p.yaml:13:12: found line 13 indented by 11 spaces, expected 10, as the other fields (line 12)"),
    "no brace": (LISTED, LISTED[:-1], "p.yaml:8:71: found no `}` at the end of line 8, expected one for its `{` in column 13"),
    "no brace and bracket": (LISTED, LISTED[:-2], "p.yaml:8:70: found no `]` at the end of line 8, expected one for its `[` in column 38"),
    "no bracket over lines": (LISTED, "data:\n        kind: dataset\n        sources: [\n          {type: files, path: a.jsonl}", "p.yaml:11:39: found no `]` at the end of line 11, expected one for the `[` in column 18 of line 10"),
    "no quote": (LISTED, LISTED.replace("rows.jsonl", '"rows.jsonl'), "p.yaml:8:59: found a quote that is never closed"),
    "no space": ("model: base", "model:base", "p.yaml:11:9: found `model:base`, expected a space after the `:`"),
    "no space first": ("kind: sft", "kind:sft", "p.yaml:10:9: found `kind:sft`, expected a space after the `:`"),
    "no colon": ("kind: sft", "kind sft", "p.yaml:10:9: found a key without `:`"),
}
# fmt: on


@pytest.mark.parametrize("case", SYNTAX)
def test_an_error_of_syntax_names_the_line_and_what_it_lacks(case: str) -> None:
    old, new, message = SYNTAX[case]
    (problem,) = problems(BLOCK.replace(old, new, 1))
    assert f"{problem.place}: {problem.message}" == message
    assert problem.hint


def test_every_indentation_of_every_line_is_answered() -> None:
    lines = BLOCK.splitlines()
    messages = []
    for n, line in enumerate(lines[1:], 1):
        for indentation in range(14):
            text = "\n".join([*lines[:n], " " * indentation + line.strip(), *lines[n + 1 :]])
            with contextlib.suppress(ConfigError):
                load_text(text)
                continue
            messages += [problem.message for problem in problems(text)]
    assert [message for message in messages if not message.startswith("found")] == []
    assert len([message for message in messages if "indented by" in message]) > 50


def test_the_page_for_people_from_other_tools_names_no_field_that_messages_do_not_know() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8")
    theirs = {name for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for name in re.findall(r"`([a-z][a-z_0-9]*)`", row)}
    ours = {field for model in (*STAGES.values(), Lora, Resources) for field in model.model_fields}
    columns = {"completion", "field_instruction"}  # a format and a column
    assert len(theirs) > 90
    assert theirs - ours - {name for table in FIELD_ALIASES.values() for name in table} - columns == set()
