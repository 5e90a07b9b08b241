"""The command line without a run: help, init, validate, schema, errors and exit codes; and that nothing heavy is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT, Project

from flows.cli import cli


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself_and_is_in_the_readme(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert cli.commands[name].help
    assert f"tuneline {name}" in (ROOT / "README.md").read_text()


def test_init_writes_a_valid_file_and_never_overwrites(project: Project) -> None:
    project.tuneline("init")
    assert project.tuneline("validate").stdout == "pipelines.yaml is valid: first (7 stages)\n"
    again = project.tuneline("init", status=2)
    assert "found a pipelines.yaml here already" in again.stderr
    assert json.loads((project.root / ".tuneline" / "schema.json").read_text())["title"] == "Spec"


CALLS = [
    (["validate", "nowhere.yaml"], "nowhere.yaml: no such file\n\nhint: `tuneline init` writes one; `--file` names another\n"),
    (["plan", "frist"], "pipelines.yaml: found no pipeline `frist`, allowed first\n\nhint: did you mean `first`?\n"),
    (["plan", "first", "--only", "sfft"], "--only: found no stage `sfft` in first, allowed base, data, sft, eval-base, eval-sft, merged, gate\n\nhint: did you mean `sft`?\n"),
    (["run", "first", "--set", "sft.seed=-1"], "--set sft.seed: first.sft.seed: found -1, allowed at least 0\n"),
    (["run", "first"], "runtimes: torch: found a runtime that is not set up\n\nhint: `tuneline setup torch` builds it\n"),
    (["setup", "trch"], "setup: found no runtime `trch`, allowed torch\n\nhint: did you mean `torch`?\n"),
    (["show", "first"], "show: found no run of first\n\nhint: start one with `tuneline run first`\n"),
    (["run"], "Missing argument 'PIPELINE'.\n\nhint: `tuneline run --help`\n"),
    (["rum"], "No such command 'rum'. Did you mean 'run'?\n\nhint: `tuneline --help`\n"),
    (["run", "first", "--forse", "x"], "No such option '--forse'. (Did you mean one of: '--force', '--set', '--verbose'?)\n\nhint: `tuneline run --help`\n"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CALLS, ids=[" ".join(arguments) for arguments, _ in CALLS])
def test_a_wrong_call_ends_with_2_and_a_message(project: Project, arguments: list[str], message: str) -> None:
    from flows.starter import STARTER

    project.write(STARTER)
    result = project.tuneline(*arguments, status=2)
    assert result.stderr == message
    assert result.stdout == ""


def test_a_missing_data_file_stops_a_run_before_it_starts(project: Project) -> None:
    project.write("version: 1\npipelines:\n  p:\n    stages:\n      d: {kind: dataset, sources: [{type: files, path: none.jsonl}]}\n")
    result = project.tuneline("run", "p", status=2)
    assert re.match(r"pipelines.yaml:5:\d+: p.d.sources.0.path: found no file at .*/none.jsonl\n\nhint: paths are relative", result.stderr)


@pytest.mark.parametrize("arguments", [["validate"], ["plan", "demo"], ["schema"], ["--help"]])
def test_what_must_answer_at_once_imports_neither_prefect_nor_torch(arguments: list[str]) -> None:
    program = f"import sys; sys.argv[1:] = {arguments!r}\nfrom flows.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "tuneline" in loaded
    assert not loaded & {"prefect", "torch", "httpx", "sqlalchemy", "fastapi", "transformers"}


def test_generated_docs_and_program_versions_are_checked() -> None:
    for script in ("generate_docs.py", "program_versions.py"):
        command = [sys.executable, ROOT / "infra" / script, "--check"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stdout + done.stderr


def test_moved_code_without_a_word_is_noticed(tmp_path: Path) -> None:
    import shutil

    for name in ("infra", "tasks", "tuneline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.gguf", "__pycache__"))
    scoring = tmp_path / "tasks" / "scoring.py"

    def check(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, tmp_path / "infra" / "program_versions.py", *arguments], capture_output=True, text=True)

    scoring.write_text(scoring.read_text() + "\n# a comment is no code\n")
    assert check("--check").returncode == 0
    scoring.write_text(scoring.read_text() + "\nMORE = 1\n")
    moved = check("--check")
    assert moved.returncode == 1
    assert "the code of `evaluate` has changed" in moved.stdout
    before = json.loads((tmp_path / "tasks" / "versions.json").read_text())["evaluate"]["version"]
    assert check("--raise", "evaluate").returncode == 0
    assert check("--check").returncode == 0
    assert json.loads((tmp_path / "tasks" / "versions.json").read_text())["evaluate"]["version"] == before + 1
