"""Messages of `validate` about grpo stages, and their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.kinds.grpo import GrpoStage
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.keys import key_document

STAGE: dict[str, Any] = {"kind": "grpo", "model": "base", "dataset": "data", "rewards": [{"type": "exact_match"}]}
FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base: {{kind: model, path: model}}
      data: {{kind: dataset, sources: [{{type: files, path: a.jsonl}}]}}
      rl:   {{kind: grpo, model: base, dataset: data, rewards: [{{type: exact_match}}], {rest}}}
"""
REFUSED = {
    "group does not divide": (
        "num_generations: 5, global_batch_size: 16",
        "demo.rl.global_batch_size: found 16, expected multiples of num_generations, 5\n\nhint: change one of them: a step samples whole groups of completions",
    ),
    "micro-batch does not divide": (
        "global_batch_size: 16, resources: {micro_batch_size: 3}",
        "demo.rl.global_batch_size: found 16, expected multiples of 3 (micro_batch_size 3 x 1 process)\n\nhint: change resources.micro_batch_size: it does not change the result",
    ),
    "dora": (
        "rollouts: {engine: vllm}, lora: {use_dora: true}",
        "demo.rl.lora.use_dora: found DoRA, which vLLM does not serve\n\nhint: remove it, or set `rollouts: {engine: transformers}`",
    ),
    "rank": (
        "rollouts: {engine: vllm}, lora: {r: 600}",
        "demo.rl.lora.r: found 600, expected at most 512, the highest rank that vLLM serves\n\nhint: lower it, or set `rollouts: {engine: transformers}`",
    ),
    "modules to save": (
        "lora: {modules_to_save: [lm_head]}",
        "demo.rl.lora.modules_to_save: found modules_to_save for grpo, which hands over only LoRA's matrices\n\nhint: remove it",
    ),
    "first weights": (
        "lora: {init_lora_weights: pissa}",
        "demo.rl.lora.init_lora_weights: found pissa, expected true or gaussian for grpo\n\nhint: remove it, or train with sft first",
    ),
    "dropout": (
        "lora: {lora_dropout: 0.1}",
        "demo.rl.lora.lora_dropout: found 0.1, expected 0 for grpo: with dropout the trained model differs from the one that samples\n\nhint: remove it",
    ),
    "sequence": (
        "importance_sampling_level: sequence",
        "demo.rl.loss_type: found dapo with importance_sampling_level: sequence, expected grpo\n\nhint: set `loss_type: grpo`: the others weigh sequences by their length again (arXiv:2507.18071)",
    ),
    "a loss that depends on the micro-batch": (
        "loss_type: bnpo",
        "demo.rl.loss_type: found 'bnpo', expected grpo, dr_grpo, dapo\n\nhint: write `dapo`, which averages over the tokens of the whole batch; bnpo averages over a micro-batch, whose size must not change a result",
    ),
    "unknown engine": ("rollouts: {engine: sglang}", "demo.rl.rollouts.engine: found 'sglang', expected transformers, vllm"),
    "engine without use": (
        "resources: {engine: {max_num_seqs: 8}}",
        "demo.rl.resources.engine: found engine settings in a stage that does not use vLLM\n\nhint: remove them, or choose vLLM for the stage",
    ),
    "all GPUs": (
        "rollouts: {engine: vllm}, resources: {gpus: 2, engine: {gpus: 2}}",
        "demo.rl.resources.engine.gpus: found 2, expected fewer than resources.gpus, 2\n\nhint: leave a GPU for the training, or set `gpus: 0` to share the first one",
    ),
    "more than there are": (
        "rollouts: {engine: vllm}, resources: {gpus: 1, engine: {gpus: 2}}",
        "demo.rl.resources.engine.gpus: found 2, expected at most resources.gpus, 1\n\nhint: raise resources.gpus: it includes the engine's GPUs",
    ),
    "unknown runtime": (
        "rollouts: {engine: vllm}, resources: {engine: {runtime: vlm}}",
        "demo.rl.resources.engine.runtime: found `vlm`, expected quantize, torch, vllm, vllm-cpu\n\nhint: did you mean `vllm`?",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused(tmp_path: Path, what: str) -> None:
    rest, message = REFUSED[what]
    file = tmp_path / "p.yaml"
    file.write_text(FILE.format(rest=rest))
    with pytest.raises(ConfigError) as caught:
        load(file)
    found = str(caught.value).partition(": ")[2]
    assert found == message


def stage(**fields: Any) -> GrpoStage:
    return GrpoStage.model_validate({**STAGE, **fields})


def config_in_key(given: ProgramStage) -> Any:
    return key_document(given, 1, {})["config"]


def test_the_engine_is_in_the_key_and_how_it_runs_is_not() -> None:
    plain, vllm = (stage(**fields, resources={"gpus": 1}) for fields in ({}, {"rollouts": {"engine": "vllm"}}))
    assert config_in_key(plain) != config_in_key(vllm)
    moved = stage(rollouts={"engine": "vllm"}, resources={"gpus": 2, "engine": {"gpus": 1, "max_num_seqs": 8, "enforce_eager": True}})
    assert config_in_key(vllm) == config_in_key(moved)


def test_which_runtimes_a_stage_needs() -> None:
    assert stage().runtimes() == ["torch"]
    assert stage(rollouts={"engine": "vllm"}).runtimes() == ["torch", "vllm-cpu"]
    assert stage(rollouts={"engine": "vllm"}, resources={"gpus": 1}).runtimes() == ["torch", "vllm"]
    own = {"gpus": 1, "engine": {"runtime": "mine"}}
    assert stage(rollouts={"engine": "vllm"}, resources=own).runtimes() == ["torch", "mine"]


def test_the_engines_devices_train_nothing() -> None:
    split = stage(rollouts={"engine": "vllm"}, resources={"gpus": 8, "engine": {"gpus": 2}}, global_batch_size=48, num_generations=8)
    assert split.resources.world_size == 6
    assert split.micro_batch_size() == 8
    shared = stage(rollouts={"engine": "vllm"}, resources={"gpus": 2})
    assert shared.resources.world_size == 2


def test_the_file_of_a_reward_is_in_the_key_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(FILE.format(rest="seed: 1").replace("{type: exact_match}", "{file: mine.py, function: score, weight: 2}"))
    (given,) = [stage for stage in load(file).spec.pipelines["demo"].stages.values() if isinstance(stage, GrpoStage)]
    config = config_in_key(given)
    assert config["rewards"] == [{"function": "score", "weight": 2.0}]
