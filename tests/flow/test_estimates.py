"""The estimates of `tuneline plan`: a table or JSON on stdout, and warnings on stderr with both."""

from __future__ import annotations

import json

from estimate_tools import CONFIGS, PIPELINE
from project import Project


def with_model(project: Project) -> Project:
    project.write(PIPELINE)
    project.write(json.dumps(CONFIGS["Qwen2.5-7B"]), "base/config.json")
    project.write('{"text": "a"}\n', "rows.jsonl")
    return project


def test_a_plan_has_a_line_for_each_training_and_merge(project: Project) -> None:
    flags = ["--set", "sft.resources.micro_batch_size=1", "--set", "sft.resources.gradient_checkpointing=true"]
    done = with_model(project).tuneline("plan", "demo", *flags)
    plan, _, estimates = done.stdout.partition("\n\n")
    assert [line.split()[0] for line in plan.splitlines()] == ["stage", "base", "data", "sft", "merged", "again"]
    assert [" ".join(line.split()) for line in estimates.splitlines()] == [
        "estimate parameters trained memory per device, at most disk",
        "sft 7,615,616,512 40,370,176 (0.53%) gpu: 17.0 GiB (weights 14.3, training states 0.5, activations 1.2, other 1.0) 1.6 GB",
        "merged 7,615,616,512 cpu: 43.3 GiB (weights 28.4, other 14.9) 15.2 GB",
        "again 7,615,616,512 40,370,176 (0.53%) cpu: 78.8 GiB (weights 28.5, training states 0.5, activations 49.1, other 0.8) 1.6 GB",
    ]
    assert done.stderr == ""


def test_json_has_the_same_in_bytes_and_null_for_other_kinds(project: Project) -> None:
    stages = {stage["stage"]: stage["estimate"] for stage in with_model(project).json("plan", "demo")["stages"]}
    assert stages["base"] is stages["data"] is None
    sft, merged = stages["sft"], stages["merged"]
    assert (sft["parameters"], sft["trainable"], sft["unknown"]) == (7_615_616_512, 40_370_176, "")
    assert sft["memory"]["total"] == sum(sft["memory"][part] for part in ("weights", "gradients", "optimizer", "activations", "other"))
    assert (merged["trainable"], merged["share"], merged["disk"]) == (None, None, 15_231_233_024)


def test_what_is_unknown_is_said_with_why(project: Project) -> None:
    with_model(project)
    project.write('{"model_type": "bert"}', "base/config.json")
    assert "sft       unknown" in (shown := project.tuneline("plan", "demo").stdout)
    assert "models of type `bert` are not supported" in shown
    assert project.json("plan", "demo")["stages"][2]["estimate"]["memory"] is None


def test_a_pool_that_is_too_small_is_warned_of(project: Project) -> None:
    warning = with_model(project).tuneline("plan", "demo").stderr
    assert warning.startswith(
        "warning: pipelines.yaml:9:15: demo.sft: about 127.9 GiB of GPU memory are needed, the pool `gpu` has 24.0 GiB for it\n"
    )
    assert "\nhint: the cheapest change that fits: `--set sft.resources.gradient_checkpointing=true" in warning
    flags = warning.split("`")[3].split()
    assert project.tuneline("plan", "demo", *flags).stderr == ""
    assert project.tuneline("validate").stderr == ""
