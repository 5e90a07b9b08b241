"""`tuneline doctor --gpu`: real stages on models of random weights; here of pico size, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from project import Project, python_of

from flows.doctor.check import OK, PROBLEM
from flows.doctor.gpu import LLAMA_1B, LLAMA_8B, SAME, SIZES, Results, parameters, stages_of, write_project
from tuneline.config.load import load

PIPELINES = "version: 1\npipelines: {one: {stages: {base: {kind: model, path: model}}}}\n"


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_its_pipelines_are_valid_and_as_advised(tmp_path: Path, size: str, gpus: int) -> None:
    write_project(tmp_path, stages_of(SIZES[size], gpus), SIZES[size])
    loaded = load(tmp_path / "pipelines.yaml")
    assert loaded.warnings() == []
    assert {stage.resources.gpus for stage in loaded.pipeline("sdpa").stages.values() if stage.kind == "sft"} == {gpus}


def test_it_counts_parameters() -> None:
    assert parameters(LLAMA_8B) == pytest.approx(8_030_261_248, rel=1e-4)  # those of Llama 3; norms are left out
    assert parameters(LLAMA_1B) == pytest.approx(1_235_814_400, rel=1e-4)


def test_it_says_what_differs() -> None:
    compared = object.__new__(Results).compared
    assert [check.status for check in compared("loss", 5.0, 5.01, SAME)] == [OK]
    (check,) = compared("loss", 5.0, 5.5, SAME)
    assert (check.status, check.message) == (PROBLEM, "5.0000 and 5.5000: 9.09% apart, expected 1%")
    assert list(compared("loss", None, 5.5, SAME)) == []


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(PIPELINES)
    found = project.json("doctor", "--gpu", status=1, CUDA_VISIBLE_DEVICES="")
    assert [(each["check"], each["status"]) for each in found["findings"]] == [("GPU", "problem")]


@pytest.mark.full
def test_it_runs_every_stage_and_judges_it(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(PIPELINES)
    runtimes = str(python_of("torch").parents[2])
    found = project.json("doctor", "--gpu", "--size", "tiny", CUDA_VISIBLE_DEVICES="", TUNELINE_RUNTIMES=runtimes, PREFECT_API_URL="")
    findings = {each["check"]: each for each in found["findings"]}
    assert found["problems"] == 0
    assert {name for name, each in findings.items() if each["status"] == "warning"} == {"grpo"}
    trained = {"lora-1b", "lora-1b with sdpa", "qlora-8b", "lora-8b"}
    assert all("tokens/s" in findings[name]["message"] for name in trained)
    assert "0.00% apart" in findings["merged beside adapter: bits per byte"]["message"]
    assert {"gptq", "eval-adapter", "eval-merged", "attention: the first loss"} < findings.keys()
    document = json.loads((tmp_path / ".tuneline" / "gpu-check" / "result.json").read_text())
    assert document["device"] == "cpu"
    assert {check["check"] for check in document["checks"]} == findings.keys()
    assert not (tmp_path / ".tuneline" / "gpu-check" / "models").exists()
