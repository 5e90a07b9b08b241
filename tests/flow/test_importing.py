"""`tuneline import` as a command, and the guides' examples run end to end on a pico model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from guide_sources import GUIDES
from project import Project

from tuneline.config.load import load

SWIFT = "swift sft --model owner/name --dataset owner/rows --tuner_type lora --new_key 1\n"


def test_a_command_is_printed_or_added_to_a_file(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(SWIFT, "train.sh")
    printed = project.tuneline("import", "train.sh")
    assert printed.stdout.startswith("version: 1\npipelines:\n  train:\n    # From train.sh (ms-swift), by `tuneline import`.\n")
    assert "keys became fields, 0 have no effect here, " in printed.stderr
    assert (
        project.tuneline("import", *SWIFT.split(), "--name", "train").stdout.partition("stages:")[2]
        == printed.stdout.partition("stages:")[2]
    )
    assert project.tuneline("import", "train.sh", "--into", "pipelines.yaml").stdout == "added the pipeline train to pipelines.yaml\n"
    assert (tmp_path / "pipelines.yaml").read_text() == printed.stdout
    again = project.tuneline("import", "train.sh", "--into", "pipelines.yaml", status=2)
    assert again.stderr == "pipelines.yaml:3:3: found the pipeline `train` already\n\nhint: choose another name with `--name`\n"
    project.tuneline("import", "train.sh", "--into", "pipelines.yaml", "--name", "More of it!")
    assert project.tuneline("validate").stdout == "pipelines.yaml is valid: train (3 stages), more-of-it (3 stages)\n"
    assert project.tuneline("import", "gone.yaml", status=2).stderr.startswith("gone.yaml: found no such file\n\nhint: name a YAML file of")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("name", GUIDES)
def test_the_examples_of_the_guides_run_end_to_end(name: str, tmp_path: Path, runtime_python: Path, pico_model: Path) -> None:
    guide, project = GUIDES[name], Project(tmp_path)
    guide.write(tmp_path)
    rows = [{"prompt": f"Say the word number {i}.", "completion": f"word{i % 7}", "answer": f"word{i % 7}"} for i in range(60)]
    project.write("".join(json.dumps(row) + "\n" for row in rows), "words.jsonl")
    project.write("def score(prompts, completions, **row):\n    return [len(completion) % 5 for completion in completions]\n", "rewards.py")
    project.write(
        f'version: 1\nroots: ["{pico_model.parent}"]\nruntimes: {{here: {{python: "{runtime_python}"}}}}\npipelines:\n  first:\n    stages:\n      base: {{kind: model, path: {pico_model}}}\n'
    )
    text = project.tuneline("import", *guide.sources).stdout
    outside = [line for line in text.splitlines() if line.startswith("roots:")]
    if outside:  # the file's own `roots` must allow them
        pipelines = (tmp_path / "pipelines.yaml").read_text()
        more = outside[0].partition("[")[2].rstrip("]")
        project.write(pipelines.replace(f'["{pico_model.parent}"]', f'["{pico_model.parent}", {more}]'))
    project.tuneline("import", *guide.sources, "--into", "pipelines.yaml", "--name", "guide")
    sets = [f"{stage}.runtime=here" for stage in load(tmp_path / "pipelines.yaml").spec.pipelines["guide"].stages]
    sets += ["base.hub=null", f"base.path={pico_model}", "data.sources=[{type: files, path: words.jsonl}]"]
    sets += [f"{guide.training}.{setting}" for setting in ("resources={}", "dtype=float32", "max_steps=2", "warmup_steps=0")]
    sets += (
        ["grpo.rollouts={}", "grpo.rewards=[{file: rewards.py, function: score}]", "grpo.max_completion_length=8"]
        if guide.training == "grpo"
        else []
    )
    sets += ["grpo.global_batch_size=20"] if guide.training == "grpo" else [f"{guide.training}.global_batch_size=4"]
    done = project.json("run", "guide", *(part for setting in sets for part in ("--set", setting)))
    assert {stage["status"] for stage in done["stages"]} == {"done"}
