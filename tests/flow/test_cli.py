"""The command line without a run: help, init, validate, schema, errors and exit codes; and that nothing heavy is imported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import PATIENCE, until
from project import ROOT, Project

from flows.commands.main import cli


@pytest.fixture(autouse=True)
def own_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projects here have none; the runtimes of the user must not count."""
    monkeypatch.delenv("TUNELINE_RUNTIMES", raising=False)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself_and_is_in_the_readme(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert cli.commands[name].help
    assert f"tuneline {name}" in (ROOT / "README.md").read_text()


def test_the_list_of_commands_cuts_no_sentence_at_80_columns() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout
    assert "..." not in shown.partition("Commands:")[2]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.process
def test_init_writes_a_valid_file_and_never_overwrites(project: Project) -> None:
    assert project.tuneline("init").stderr == "next: `tuneline setup`, then `tuneline run first`\n"
    assert project.tuneline("validate").stdout == "pipelines.yaml is valid: first (7 stages)\n"
    again = project.tuneline("init", status=2)
    assert "found a pipelines.yaml here already" in again.stderr
    assert json.loads((project.root / ".tuneline" / "schema.json").read_text())["title"] == "Spec"


CALLS = [
    (['validate', 'nowhere.yaml'], 'nowhere.yaml: found no such file\n\nhint: create one with `tuneline init`, or name another with `--file`\n'),
    (['validate', 'folder'], 'folder: found a folder, expected a file\n\nhint: name the file in it\n'),
    (['validate', 'folder/file/x'], 'folder/file/x: the file cannot be read: Not a directory\n\nhint: check its name and its permissions\n'),
    (['validate', '/proc/self/mem'], '/proc/self/mem: the file cannot be read: Input/output error\n\nhint: check its name and its permissions\n'),
    (['validate', 'empty.yaml'], 'empty.yaml:1:1: the file is empty\n\nhint: run `tuneline init` in an empty folder to create a file to start from\n'),
    (['validate', 'other version.yaml'], 'other version.yaml:1:1: pipelines: found nothing, expected a value (Pipelines by name)\n\nhint: add `pipelines: {demo: {stages: {base: {kind: model, hub: owner/name}}}}`\n\nother version.yaml:1:10: version: found 2, expected 1\n\nhint: write `version: 1`\n'),
    (['validate', "n" * 300 + ".yaml"], 'nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn.yaml: the file cannot be read: File name too long\n\nhint: check its name and its permissions\n'),
    (['plan', 'first', '--file', 'nowhere.yaml'], 'nowhere.yaml: found no such file\n\nhint: create one with `tuneline init`, or name another with `--file`\n'),
    (['plan', 'frist'], 'pipelines.yaml: found no pipeline `frist`, expected first\n\nhint: did you mean `first`?\n'),
    (['plan', 'first/sft'], 'pipelines.yaml: found no pipeline `first/sft`, expected first\n\nhint: did you mean `first`?\n'),
    (['plan', ''], 'pipelines.yaml: found no pipeline ``, expected first\n'),
    (['plan', '../first'], 'pipelines.yaml: found no pipeline `../first`, expected first\n\nhint: did you mean `first`?\n'),
    (['run', 'frist', '--json'], 'pipelines.yaml: found no pipeline `frist`, expected first\n\nhint: did you mean `first`?\n'),
    (['plan', 'first', '--only', 'sfft'], '--only: found no stage `sfft` in first, expected base, data, sft, eval-base, eval-sft, merged, gate\n\nhint: did you mean `sft`?\n'),
    (['plan', 'first', '--only', ''], '--only: found no stage `` in first, expected base, data, sft, eval-base, eval-sft, merged, gate\n'),
    (['plan', 'first', '--force', 'gat'], '--force: found no stage `gat` in first, expected base, data, sft, eval-base, eval-sft, merged, gate\n\nhint: did you mean `gate`?\n'),
    (['run', 'first', '--force', 'sfft', '--force', 'sft', '--force', 'bse'], '--force: found no stage `sfft` in first, expected base, data, sft, eval-base, eval-sft, merged, gate\n\nhint: did you mean `sft`?\n\n--force: found no stage `bse` in first, expected base, data, sft, eval-base, eval-sft, merged, gate\n\nhint: did you mean `base`?\n'),
    (['run', 'first', '--only', 'all'], '--only: found no stage `all` in first, expected base, data, sft, eval-base, eval-sft, merged, gate\n'),
    (['run', 'first', '--set', 'sft.seed=-1'], '--set sft.seed: first.sft.seed: found -1, expected at least 0\n'),
    (['run', 'first', '--set', 'sft.seed'], '--set sft.seed: found no `=`, expected stage.field=value\n'),
    (['plan', 'first', '--set', 'sft.lora.q=1'], '--set sft.lora.q: first.sft.lora.q: found the unknown field `q`, expected target_modules, exclude_modules, layers_to_transform, modules_to_save, r, lora_alpha, lora_dropout, rank_pattern, alpha_pattern, init_lora_weights, lora_plus_ratio, use_rslora, use_dora\n'),
    (['plan', 'first', '--set', 'eval-sft.datasets.1=data'], '--set eval-sft.datasets.1: found `1` as a list index, expected 0 to 0\n\nhint: to replace the whole list, write `=[a, b]`\n'),
    (['plan', 'first', '--set', 'sft.lora={'], '--set sft.lora: found the end of the text, expected a value\n\nhint: close the bracket, brace or quote that was opened\n'),
    (['plan', 'first', '--set', 'base.hub=../..'], "--set base.hub: first.base.hub: found '../..', expected owner/name, as on the hub\n\nhint: for a local folder, write `path: ../..`\n"),
    (['plan', 'first', '--set', 'data.sources.0={type: files, path: /etc/passwd}'], "--set data.sources.0: first.data.sources.0.path: found '/etc/passwd', expected a path inside the folder of the file\n\nhint: add `roots: [/etc]` at the top of the file\n"),
    (['plan', 'first', '--var', 'rank=8'], '--var rank: found an unknown variable, expected none (none is defined)\n'),
    (['plan', 'first', '--var', 'rank'], '--var rank: found no `=`, expected name=value\n'),
    (['run', 'first'], 'runtimes: torch: found a runtime that is not set up\n\nhint: `tuneline setup torch` builds it\n'),
    (['run', 'first', '--json'], 'runtimes: torch: found a runtime that is not set up\n\nhint: `tuneline setup torch` builds it\n'),
    (['setup', 'trch'], 'setup: found no runtime `trch`, expected quantize, torch, vllm, vllm-cpu\n\nhint: did you mean `torch`?\n'),
    (['show', 'first'], 'first: found no run of it yet\n\nhint: start one with `tuneline run first`\n'),
    (['show', 'frist'], 'pipelines.yaml: found no pipeline `frist`, expected first\n\nhint: did you mean `first`?\n'),
    (['show', 'first/sft'], 'first: found no run of it yet\n\nhint: start one with `tuneline run first`\n'),
    (['show', 'first', '--run', '../../x'], '--run: found no run ../../x of first\n\nhint: start one with `tuneline run first`\n'),
    (['verify', '--file', 'empty.yaml'], 'empty.yaml:1:1: the file is empty\n\nhint: run `tuneline init` in an empty folder to create a file to start from\n'),
    (['run'], "Missing argument 'PIPELINE'.\n\nhint: `tuneline list` names the pipelines of the file\n"),
    (['worker'], "Missing argument 'POOL'.\n\nhint: `tuneline worker --help`\n"),
    (['run', 'first', 'second'], 'Got unexpected extra argument (second)\n\nhint: `tuneline run PIPELINE --only STAGE` runs one stage and its upstream stages; `--set STAGE.FIELD=VALUE` sets a field\n'),
    (['rum'], "No such command 'rum'. Did you mean 'run'?\n\nhint: `tuneline --help`\n"),
    (['run', 'first', '--forse', 'x'], "No such option '--forse'. (Did you mean one of: '--force', '--set', '--verbose'?)\n\nhint: `tuneline run --help`\n"),
    (['plan', 'first', '--set'], "Option '--set' requires an argument.\n\nhint: `tuneline --help`\n"),
    (['schema', 'x'], 'Got unexpected extra argument (x)\n\nhint: `tuneline schema --help`\n'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [pytest.param(*call, id=" ".join(call[0]), marks=[pytest.mark.process] * (i % 15 == 0)) for i, call in enumerate(CALLS)],
)
def test_a_wrong_call_ends_with_2_and_a_message(project: Project, arguments: list[str], message: str) -> None:
    from flows.commands.starter import STARTER

    project.write(STARTER)
    project.write("", "empty.yaml")
    project.write("version: 2", "other version.yaml")
    project.write("# nothing", "folder/file")
    result = project.tuneline(*arguments, status=2)
    assert result.stderr == message
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_missing_data_file_stops_a_run_before_it_starts(project: Project, command: str) -> None:
    project.write("version: 1\npipelines:\n  p:\n    stages:\n      d: {kind: dataset, sources: [{type: files, path: none.jsonl}]}\n")
    result = project.tuneline(command, "p", status=2)
    assert re.match(r"pipelines.yaml:5:\d+: p.d.sources.0.path: found no file at .*/none.jsonl\n\nhint: paths are relative", result.stderr)


def test_plan_prints_errors_first_and_once_and_no_estimate_of_what_is_missing(project: Project) -> None:
    stages = "{base: {kind: model, path: owner/name}, data: {kind: dataset, sources: [{type: files, path: none.jsonl}]}, sft: {kind: sft, model: base, dataset: data}}"
    project.write(f"version: 1\npipelines: {{p: {{stages: {stages}}}}}\n")
    result = CliRunner().invoke(cli, ["plan", "p", "--file", str(project.root / "pipelines.yaml")])
    assert result.exit_code == 2
    assert result.output.index("found no file at") < result.output.index("why")
    assert [result.output.count(f"found no file at {project.root / name}") for name in ("owner/name", "none.jsonl")] == [1, 1]
    assert "hint: paths are relative to pipelines.yaml; for a model on the hub, write `hub: owner/name`\n" in result.stderr
    assert "see the error above" in result.stdout
    assert not {"Errno", "No such file", "estimate"} & set(re.findall(r"Errno|No such file|estimate", result.output))
    assert project.json("plan", "p", status=2)["stages"][0]["reasons"]


def test_plan_says_what_unknown_means_if_the_hub_would_know(project: Project) -> None:
    words = "unknown: `--online` asks the hub; otherwise decided when the run starts\n"
    project.write("version: 1\npipelines: {p: {stages: {base: {kind: model, hub: owner/name}}}}\n")
    assert project.tuneline("plan", "p").stderr == words
    assert project.tuneline("plan", "p", "--json").stderr == ""
    project.write("version: 1\npipelines: {p: {stages: {base: {kind: model, path: here}}}}\n")
    project.write("x", "here/x")
    assert project.tuneline("plan", "p").stderr == ""


@pytest.mark.parametrize("arguments", [["validate"], ["plan", "demo"], ["schema"], ["--help"]])
def test_what_must_answer_at_once_imports_neither_prefect_nor_torch(arguments: list[str]) -> None:
    program = f"import sys; sys.argv[1:] = {arguments!r}\nfrom flows.commands.main import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "tuneline" in loaded
    assert not loaded & {"prefect", "torch", "httpx", "sqlalchemy", "fastapi", "transformers"}


@pytest.mark.slow
def test_moved_code_or_defaults_without_a_word_are_noticed(tmp_path: Path) -> None:
    import shutil

    for name in ("infra", "tasks", "tuneline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.gguf", "__pycache__"))

    def check(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, tmp_path / "infra" / "program_versions.py", *arguments], capture_output=True, text=True)

    def edit(file: str, before: str, after: str) -> None:
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1
        (tmp_path / file).write_text(text.replace(before, after))

    harness = tmp_path / "tasks" / "evaluation" / "harness.py"
    harness.write_text(harness.read_text() + "\n# a comment is no code\n")
    assert check("--check").returncode == 0
    harness.write_text(harness.read_text() + "\nMORE = 1\n")
    edit("tuneline/kinds/adapters.py", "r: int = Field(16, ge=1", "r: int = Field(8, ge=1")
    edit("tuneline/kinds/training.py", "max_grad_norm: float = Field(1.0", "max_grad_norm: float = Field(0.3")
    edit("tuneline/kinds/grpo.py", "    epsilon: float = Field(0.2, gt=0)", "    clipping: float = Field(0.2, gt=0)")
    edit("tuneline/kinds/sft.py", "packing: bool = False", "packing: bool = Field(default_factory=lambda: True)")
    edit("tuneline/kinds/rewards.py", "seconds: float = Field(10.0", "seconds: float = Field(20.0")
    edit("tuneline/kinds/dataset.py", "split: Split = Split()", "split: Split = Split(test=0.2)")
    edit("tuneline/kinds/stage.py", "gpus: int = Field(0", "gpus: int = Field(1")  # in no key
    moved = check("--check")
    assert moved.returncode == 1
    lines = moved.stdout.splitlines()
    assert [line for line in lines if line.startswith(("a default", "the code"))] == [
        'a default of `dataset` changed: split {} -> {"test": 0.2}',
        "a default of `sft` changed: lora.r 16 -> 8",
        "a default of `sft` changed: max_grad_norm 1.0 -> 0.3",
        "a default of `sft` changed: packing false -> true",
        *(f"a default of `{kind}` changed: {moved}" for kind in ("dpo", "kto") for moved in ("lora.r 16 -> 8", "max_grad_norm 1.0 -> 0.3")),
        "a default of `grpo` changed: lora.r 16 -> 8",
        "a default of `grpo` changed: max_grad_norm 1.0 -> 0.3",
        "a default of `grpo` changed: rewards.python_tests.seconds 10.0 -> 20.0",
        "a default of `grpo` is new: clipping 0.2",
        "a default of `grpo` is gone: epsilon 0.2",
        "the code of `evaluate` has changed",
    ]
    hints = [line for line in lines if "program_versions.py --" in line]
    assert [line.split()[2:4] for line in hints] == [
        *(["--raise", kind] for kind in ("dataset", "sft", "dpo", "kto", "grpo", "evaluate")), ["--same", "evaluate"],
    ]  # fmt: skip
    refused = check("--same", "sft")
    assert (refused.returncode, "--same sft: found other defaults of lora.r, max_grad_norm, packing" in refused.stderr) == (1, True)
    before = json.loads((tmp_path / "tasks" / "versions.json").read_text())["evaluate"]["version"]
    assert check("--raise", "evaluate", "dataset", "sft", "dpo", "kto", "grpo").returncode == 0
    assert check("--check").returncode == 0
    assert json.loads((tmp_path / "tasks" / "versions.json").read_text())["evaluate"]["version"] == before + 1


def test_what_runs_foreign_code_is_warned_of_by_every_command_of_its_pipeline(project: Project) -> None:
    stage = "version: 1\npipelines:\n  p: {stages: {base: {kind: model, path: here, trust_remote_code: true}}}\n  q: {stages: {base: {kind: model, path: here}}}\n"
    project.write(stage)
    project.write("x", "here/x")
    warning = "warning: pipelines.yaml:3:67: p.base.trust_remote_code: runs Python files that come with this model\n"
    assert project.tuneline("validate").stderr == warning
    assert project.tuneline("plan", "p").stderr == warning
    assert project.tuneline("run", "p", status=2).stderr.startswith(warning)
    assert project.tuneline("plan", "q").stderr == ""
    flag = project.tuneline("plan", "q", "--set", "base.trust_remote_code=true").stderr
    assert flag == "warning: --set base.trust_remote_code: q.base.trust_remote_code: runs Python files that come with this model\n"


def test_a_file_missing_by_flag_is_reported_as_the_flags(project: Project) -> None:
    project.write("version: 1\npipelines: {p: {stages: {d: {kind: dataset, sources: [{type: files, path: a.jsonl}]}}}}\n")
    result = project.tuneline("run", "p", "--set", "d.sources.0.path=b.jsonl", status=2)
    assert result.stderr.startswith("--set d.sources.0.path: p.d.sources.0.path: found no file at ")


@pytest.mark.process
@pytest.mark.parametrize("module", ["click", "yaml", "pydantic"])
def test_ctrl_c_while_modules_are_imported_ends_with_a_word(project: Project, module: str) -> None:
    """A module of that name, first on the path, sends the signal during its import."""
    project.write("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n", f"first/{module}.py")
    result = project.tuneline("validate", status=130, PYTHONPATH=f"{project.root / 'first'}:{ROOT}")
    assert (result.stdout, result.stderr) == ("", "interrupted; run again to resume\n")


RUN = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pipelines:
  p:
    parallel: 1
    stages:
      one: {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
      two: {kind: dataset, runtime: stand-in, sources: [{type: files, path: two.txt}], needs: [one]}
"""


@pytest.fixture
def two_stages(project: Project, stand_in: Callable[..., None]) -> Project:
    project.write(RUN)
    for name in ("one", "two"):
        project.write(name, f"{name}.txt")
    return project


@pytest.mark.slow
@pytest.mark.process
def test_an_interrupted_run_prints_its_json(two_stages: Project, stand_in: Callable[..., None]) -> None:
    stand_in(two=["sleep"])
    process = two_stages.start("run", "p", "--json", PREFECT_API_URL="")
    until((two_stages.root / "sleeping-two").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["state"] == "cancelled"
    assert {stage["stage"]: stage["status"] for stage in document["stages"]}["one"] == "done"
    assert "interrupted; run again to resume\n" in err
    report = Path(err.splitlines()[-1].removeprefix("report: ")).read_text(encoding="utf-8")
    assert '<span class="state cancelled">' in report
    early = two_stages.start("run", "p", "--json", PREFECT_API_URL="")
    assert early.stderr is not None
    assert early.stderr.readline() == "starting Prefect (5 to 15 s; half a minute the first time on a machine)\n"
    early.send_signal(signal.SIGINT)
    out, err = early.communicate(timeout=PATIENCE)
    assert (early.returncode, json.loads(out)) == (130, {"pipeline": "p", "run_id": None, "state": "cancelled", "stages": []})


@pytest.mark.slow
@pytest.mark.process
def test_a_reader_that_goes_away_does_not_end_a_run(two_stages: Project, prefect_server: str) -> None:
    """As in `tuneline run -v p 2>&1 | head -1`."""
    process = two_stages.start("run", "-v", "p")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline()
    process.stderr.close()
    process.stdout.close()
    assert process.wait(PATIENCE) == 0
    assert [stage["status"] for stage in two_stages.json("run", "p")["stages"]] == ["cached", "cached"]
    assert two_stages.json("show", "p")["state"] == "completed"


def test_a_table_that_nobody_reads_to_its_end_is_no_error(project: Project) -> None:
    command = f"{sys.executable} -m flows schema | head -c 20; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('{\n "$defs": {\n  "Ada0\n', "")
