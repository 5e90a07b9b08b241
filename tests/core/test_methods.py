"""Effects of sft's `method` in the core: output type, messages of `validate`, and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneline.canonical import key_of
from tuneline.config.load import load
from tuneline.config.spec import STAGES
from tuneline.errors import ConfigError
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.inputs import libraries_of
from tuneline.planning.keys import Outside, key_document
from tuneline.workspace.workspace import Workspace

FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base: {{kind: model, path: model}}
      data: {{kind: dataset, sources: [{{type: files, path: a.jsonl}}]}}
      sft:  {{kind: sft, model: base, dataset: data, {fields}}}
      next: {{{after}}}
"""
AFTER = "kind: evaluate, model: sft, datasets: [data]"
FULL = "method: full, learning_rate: 1e-5"
# fmt: off
REFUSED = {
    "full with lora": (f"{FULL}, lora: {{r: 8}}", AFTER, "demo.sft.lora: found lora with `method: full`, which trains the model's own weights\n\nhint: remove it, or set `method: lora`"),
    "full with an adapter": (f"{FULL}, adapter: next", "kind: sft, model: base, dataset: data", "demo.sft.adapter: found an adapter with `method: full`, which trains the model's own weights\n\nhint: merge the adapter, and name the merge stage under `model:`"),
    "bits of lora": ("bits: 8", AFTER, "demo.sft.bits: found bits with `method: lora`, which quantizes nothing\n\nhint: remove it, or set `method: qlora`"),
    "bits of full": (f"{FULL}, bits: 4", AFTER, "demo.sft.bits: found bits with `method: full`, which quantizes nothing\n\nhint: remove it, or set `method: qlora`"),
    "2 bits": ("method: qlora, bits: 2", AFTER, "demo.sft.bits: found 2, expected 4, 8"),
    "another method": ("method: dora", AFTER, "demo.sft.method: found 'dora', expected lora, qlora, full\n\nhint: write `lora`, and `lora: {use_dora: true}`"),
    "dora on 8 bits": ("method: qlora, bits: 8, lora: {use_dora: true}", AFTER, "demo.sft.lora.use_dora: found DoRA with `method: qlora` and 8 bits, expected 4 bits\n\nhint: remove use_dora, or bits"),
    "zero3": ("method: qlora, resources: {strategy: zero3}", AFTER, "demo.sft.resources.strategy: found zero3 with `method: qlora`, expected ddp, zero1, zero2 or device_map\n\nhint: set `strategy: zero2`: quantized weights cannot be sharded, but take little memory"),
    "fsdp": ("method: qlora, resources: {strategy: fsdp}", AFTER, "demo.sft.resources.strategy: found fsdp with `method: qlora`, expected ddp, zero1, zero2 or device_map\n\nhint: set `strategy: zero2`: quantized weights cannot be sharded, but take little memory"),
    "a model merged": (FULL, "kind: merge, adapters: [sft]", "demo.next.adapters.0: found `sft`, which gives a Model, expected a stage that gives an Adapter: none (none is defined)"),
    "a model gone on from as an adapter": (FULL, "kind: sft, model: base, dataset: data, adapter: sft", "demo.next.adapter: found `sft`, which gives a Model, expected a stage that gives an Adapter: none (none is defined)"),
    "an adapter trained on": ("method: qlora", "kind: grpo, model: sft, dataset: data, rewards: [{type: exact_match}]", "demo.next.model: found `sft`, which gives an Adapter, expected a stage that gives a Model: base"),
    "an adapter quantized": ("method: qlora", "kind: quantize, model: sft, calibration: data", "demo.next.model: found `sft`, which gives an Adapter, expected a stage that gives a Model: base"),
}
# fmt: on
TAKEN = {
    "evaluated": (FULL, AFTER),
    "evaluated by vLLM": (FULL, AFTER + ", backend: vllm"),
    "quantized": (FULL, "kind: quantize, model: sft, calibration: data"),
    "trained on": (FULL, "kind: grpo, model: sft, dataset: data, rewards: [{type: exact_match}], lora: {r: 32}"),
    "trained whole again": (FULL, "kind: sft, model: sft, dataset: data, " + FULL),
    "split over devices": (FULL + ", resources: {gpus: 2, strategy: zero3}", AFTER),
    "qlora merged": ("method: qlora, lora: {use_dora: true}", "kind: merge, adapters: [sft]"),
    "qlora gone on from": ("method: qlora", "kind: sft, model: base, dataset: data, adapter: sft"),
}


def write(folder: Path, fields: str, after: str = AFTER) -> Path:
    file = folder / "pipelines.yaml"
    file.write_text(FILE.format(fields=fields, after=after))
    return file


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(tmp_path: Path, name: str) -> None:
    fields, after, expected = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, fields, after))
    assert expected in [str(problem).partition(": ")[2] for problem in caught.value.problems]


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_trained_whole_is_a_model_and_else_an_adapter(tmp_path: Path, name: str) -> None:
    assert load(write(tmp_path, *TAKEN[name])).warnings() == []


def test_a_learning_rate_for_adapters_is_warned_of(tmp_path: Path) -> None:
    found = [str(warning) for warning in load(write(tmp_path, "method: full")).warnings()]
    text = "0.0002, the default, suits adapters but is too high for training all weights\n\nhint: set a lower one, for example `learning_rate: 1e-5`"
    assert [warning.partition(": ")[2] for warning in found] == [f"demo.sft.learning_rate: {text}"]
    assert load(write(tmp_path, "method: full, learning_rate: 2e-4")).warnings() == []  # it was set explicitly


def key(**fields: Any) -> str:
    config = {"kind": "sft", "model": "base", "dataset": "data", "learning_rate": 1e-3, "packing": True, **fields}
    stage = STAGES["sft"].model_validate(config)
    assert isinstance(stage, ProgramStage)
    return key_of(key_document(stage, 1, {}, Outside(libraries={"torch": "2.13.0"})))


def test_each_method_has_a_key_of_its_own_and_lora_that_of_the_default() -> None:
    before = key(lora={"r": 8})
    assert key(lora={"r": 8}, method="lora") == before
    lora = {"lora": {"r": 8}}
    assert len({before, key(**lora, method="qlora"), key(**lora, method="qlora", bits=8), key(method="full"), key()}) == 5


def test_bitsandbytes_is_in_the_key_of_qlora_alone(tmp_path: Path) -> None:
    def libraries(method: str) -> dict[str, str]:
        workspace = Workspace(load(write(tmp_path, f"method: {method}")))
        stage = workspace.loaded.pipeline("demo").stages["sft"]
        assert isinstance(stage, ProgramStage)
        return libraries_of(workspace, stage)

    lora, qlora = libraries("lora"), libraries("qlora")
    assert libraries("full") == lora
    assert qlora.pop("bitsandbytes") not in ("", "absent")
    assert qlora == lora
