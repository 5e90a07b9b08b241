"""The whole pipeline with the real programs on a pico model, by the real command: killed during training and run again in one folder,
undisturbed in another. Both must produce the same digests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pico_project import copied, make
from project import Project
from report_page import Page

pytestmark = pytest.mark.usefixtures("prefect_server")
OTHER_METHODS = """\
version: 1
roots: ["%(models)s"]
runtimes: {here: {python: "%(python)s"}}
pipelines:
  methods:
    stages:
      base:      {kind: model, path: %(model)s, runtime: here}
      words:     {kind: dataset, model: base, sources: [{type: files, path: words.jsonl}], split: {validation: 0.1, test: 0.2}, runtime: here}
      full:      {kind: sft, method: full, model: base, dataset: words, learning_rate: 1e-3, max_steps: 40, global_batch_size: 4, runtime: here}
      qlora:     {kind: sft, method: qlora, model: full, dataset: words, learning_rate: 5e-3, max_steps: 4, global_batch_size: 4, runtime: here}
      merged:    {kind: merge, adapters: [qlora], runtime: here}
      eval-base: {kind: evaluate, model: base, datasets: [words], max_new_tokens: 4, runtime: here}
      eval-full: {kind: evaluate, model: full, datasets: [words], max_new_tokens: 4, runtime: here}
      gate:      {kind: gate, require: [{metric: words/answer_recall, of: eval-full, not_below: eval-base}]}
"""
STAGES = ("base", "words", "sft", "merged", "gptq", "eval", "eval-sft")
# Packages that a program of the kind must not import: it does not use them, and each delays its start.
UNUSED = {
    "model": "bitsandbytes deepspeed gptqmodel torchao peft trl datasets lm_eval matplotlib",
    "dataset": "bitsandbytes deepspeed gptqmodel torchao peft trl datasets lm_eval torch accelerate scipy",
    "sft": "bitsandbytes deepspeed gptqmodel torchao lm_eval matplotlib",
    "merge": "bitsandbytes deepspeed gptqmodel torchao trl datasets lm_eval matplotlib",
    "evaluate": "bitsandbytes deepspeed gptqmodel torchao trl datasets matplotlib",
    "quantize": "bitsandbytes deepspeed torchao peft trl lm_eval matplotlib",
}


def digests(project: Project) -> dict[str, Any]:
    return {name: stage["digest"] for name, stage in project.json("show", "pico")["stages"].items() if stage}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, pico_run: Project) -> Project:
    return copied(pico_run, tmp_path_factory.mktemp("killed") / "project")


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_and_an_undisturbed_run_end_with_the_same_digests(
    killed: Project, tmp_path_factory: pytest.TempPathFactory, program_python: Path, pico_model: Path
) -> None:
    other = make(tmp_path_factory.mktemp("other folder") / "püroject", program_python, pico_model)
    other.tuneline("run", "pico", PYTHONHASHSEED="2")
    assert set(digests(killed)) == set(STAGES)
    assert digests(other) == digests(killed)


@pytest.mark.slow
def test_a_training_that_two_runs_made_has_one_curve_and_its_link_is_shown(killed: Project) -> None:
    curves = killed.root / ".tuneline" / "tensorboard" / "pico" / "sft"
    assert [len(list(folder.glob("events.*"))) for folder in curves.iterdir()] == [2]
    assert "tensorboard: tensorboard --logdir /" in killed.tuneline("show", "pico/sft").stdout


@pytest.mark.slow
def test_programs_import_what_their_kind_needs(killed: Project) -> None:
    written = [(file.name.split("-")[0], json.loads(file.read_bytes())) for file in (killed.root / "imports").glob("*.json")]
    assert sorted(kind for kind, _ in written) == sorted([*UNUSED, "evaluate"])
    assert [(kind, name) for kind, found in written for name in UNUSED[kind].split() if name in found["modules"]] == []
    assert [(kind, found) for kind, found in written if kind != "dataset" and found["frozen"] < 2 * found["others"]] == []


@pytest.mark.slow
def test_a_second_run_starts_no_process_and_plans_say_why(killed: Project) -> None:
    again = killed.json("run", "pico")
    assert [stage["status"] for stage in again["stages"]] == ["cached"] * len(STAGES) + ["done"]
    plan = killed.json("plan", "pico", "--set", "sft.lora.r=4")["stages"]
    assert {row["stage"]: row["status"] for row in plan} == {
        "base": "cached", "words": "cached", "sft": "run", "gate": "run",
        **dict.fromkeys(("merged", "gptq", "eval", "eval-sft"), "run or cached"),
    }  # fmt: skip
    assert [reason["text"] for reason in plan[2]["reasons"]] == ["lora.r 8 -> 4"]
    same = killed.json("plan", "pico", "--set", "sft.resources.micro_batch_size=1", "--set", "sft.retries=9")["stages"]
    assert {row["status"] for row in same if row["kind"] != "gate"} == {"cached"}


@pytest.mark.slow
def test_templates_and_parents_travel_in_the_manifests(killed: Project) -> None:
    stages = killed.json("show", "pico")["stages"]
    templates = {stages[name]["template"] for name in ("base", "sft", "merged", "gptq")}
    assert len(templates) == 1
    assert None not in templates
    assert stages["sft"]["base"]["digest"] == stages["base"]["digest"]
    assert stages["merged"]["parents"]["adapters.0"] == f"sft/{stages['sft']['key']}"
    assert stages["merged"]["metrics"]["max_logit_difference"] < 1e-3
    assert killed.tuneline("verify").stderr == f"{len(STAGES)} artifacts, 0 damaged\n"


@pytest.mark.slow
def test_the_report_holds_the_figures_of_the_manifests(killed: Project) -> None:
    shown = killed.json("show", "pico")
    page = Page((killed.root / ".tuneline" / "runs" / f"{shown['run_id']}.html").read_text(encoding="utf-8"))
    assert page.self_contained()
    for name in STAGES:
        for metric, value in shown["stages"][name]["metrics"].items():
            assert page.figures[name, metric.replace("dataset0/", "words/")] == value
        assert shown["stages"][name]["digest"] in page.text
    said = " ".join(page.text.split())
    for heading in (
        "gate done figure required met words/bits_per_byte of eval",
        "Training of sft",
        "tensorboard tensorboard --logdir /",
        "adapter sft",
        "quantized gptq",
        "words.jsonl 60",
    ):
        assert heading in said
    rows = shown["stages"]["words"]["metrics"]["rows_test"]
    assert f"6 of {rows:.0f} shown." in said
    assert page.figures["gptq", "words/bits_per_byte"] == shown["stages"]["eval"]["metrics"]["dataset0/bits_per_byte"]


@pytest.mark.slow
def test_a_touched_base_model_is_the_same_model(killed: Project, pico_model: Path) -> None:
    os.utime(pico_model / "model.safetensors")
    out = killed.json("run", "pico", "--only", "eval-sft", "--set", "eval-sft.max_new_tokens=3")
    assert [stage["status"] for stage in out["stages"]] == ["cached", "cached", "cached", "done"]


@pytest.mark.slow
@pytest.mark.full
def test_a_model_trained_whole_is_evaluated_trained_on_and_shown(killed: Project, program_python: Path, pico_model: Path) -> None:
    file = "methods.yaml"
    killed.write(OTHER_METHODS % {"python": program_python, "model": pico_model, "models": pico_model.parent}, file)
    assert killed.tuneline("validate", file).stdout == "methods.yaml is valid: methods (8 stages)\n"
    planned = {row["stage"]: row for row in killed.json("plan", "methods", "--file", file)["stages"]}
    assert {name: row["status"] for name, row in planned.items()} == {
        "base": "cached", "words": "cached", "full": "run", "qlora": "run", "merged": "run", "eval-base": "run", "eval-full": "run",
        "gate": "run",
    }  # fmt: skip
    killed.tuneline("run", "methods", "--file", file)
    shown = killed.json("show", "methods", "--file", file)
    stages = shown["stages"]
    assert (stages["full"]["type"], stages["full"]["base"], stages["qlora"]["type"]) == ("Model", None, "Adapter")
    assert stages["qlora"]["base"]["digest"] == stages["full"]["digest"]
    assert stages["full"]["template"] == stages["base"]["template"]
    bits = {name: stages[f"eval-{name}"]["metrics"]["dataset0/bits_per_byte"] for name in ("base", "full")}
    assert bits["full"] < 0.7 * bits["base"]
    page = Page((killed.root / ".tuneline" / "runs" / f"{shown['run_id']}.html").read_text(encoding="utf-8"))
    assert "fine-tuned full" in " ".join(page.text.split())
    again = killed.json("run", "methods", "--file", file)
    assert {row["status"] for row in again["stages"] if row["kind"] != "gate"} == {"cached"}
