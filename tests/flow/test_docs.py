"""The pages of docs/ with commands: run them, apply their code, compare their output.

The name of a fenced block says how it is used: ```console has commands and their output, ```diff FILE a change of a file, any other name
a new file. Blocks without a name, such as ```sh, are skipped. Numbers, keys and folders differ between machines.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from project import ROOT

from tuneline.config.load import load
from tuneline.errors import FailureClass

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    file: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*(part or "" for part in found.groups())) for found in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8"))]


class Reader:
    """Follows a page in a project folder, with the packages in `packages`."""

    def __init__(self, project: Path, packages: Path, runtimes: Path):
        self.project, self.packages = project, packages
        bin = project.parent / "bin"
        bin.mkdir()
        for name, call in (("tuneline", "-m flows"), ("python", "")):
            (bin / name).write_text(f'#!/bin/sh\nexec {sys.executable} {call} "$@"\n')
            (bin / name).chmod(0o755)
        self.env = {**os.environ, "PYTHONPATH": str(packages), "PATH": f"{bin}:{os.environ['PATH']}", "COLUMNS": "200"}
        self.env["TUNELINE_RUNTIMES"] = str(runtimes)
        project.mkdir(parents=True)

    def follow(self, block: Block, folder: Path) -> None:
        if block.language == "console":
            for command, expected in commands(block.text):
                self.run(command, expected, folder)
        elif block.language == "diff":
            change(folder / block.file, block.text)
        elif block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")

    def run(self, command: str, expected: str, folder: Path) -> None:
        done = subprocess.run(command, shell=True, cwd=folder, env=self.env, capture_output=True, text=True, timeout=600)
        found = done.stdout + ("" if done.returncode == 0 else done.stderr)
        assert agree(found, expected), f"$ {command}\nprints\n{done.stdout}\n{done.stderr}\nthe page says\n{expected}"


def commands(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        yield command.partition("  #")[0].strip(), expected


def agree(found: str, expected: str) -> bool:
    """Compare line by line, without spaces and what differs between machines; a line `...` matches any lines."""
    lines = [re.escape(plain(line)) if line.strip() != "..." else "(?:.*\n)*?.*" for line in expected.strip().splitlines()]
    return re.fullmatch("\n".join(lines), "\n".join(map(plain, found.strip().splitlines()))) is not None


def plain(line: str) -> str:
    line = re.sub(r"(/\S+)?/\.tuneline/", ".tuneline/", line)
    line = re.sub(r"\d{8}T\d{6,9}Z?-\w+", "RUN", line)
    line = re.sub(r"\b[0-9a-f]{2}/[0-9a-f]{64}\b", "KEY", line)
    line = re.sub(r"\b[0-9a-f]{12,64}\b", "KEY", line)
    line = re.sub(r"-?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( min \d\d)?\b", "N", line)
    return " ".join(line.split())


def change(file: Path, diff: str) -> None:
    """Apply a diff. Lines with `-` or a space must occur exactly once; lines with `+` or a space replace them."""
    lines = diff.splitlines()
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in marks) for marks in ("- ", "+ "))
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file.name} holds this {text.count(before)} times:\n{before}"
    file.write_text(text.replace(before, after), encoding="utf-8")


def test_a_page_that_says_something_else_is_found_out() -> None:
    assert agree("sft  done  1.2 s  loss 3e-05\nmore\n", "sft done 9 min 02 s loss 0.5\n...\n")
    assert agree("a\nb\nc\n", "a\n...\nc\n")
    assert not agree("sft  failed  1.2 s\n", "sft  done  1.2 s\n")
    assert not agree("a\nb\n", "a\n")


@pytest.mark.slow
def test_two_kinds_are_added_as_the_page_says(
    tmp_path: Path, runtime_python: Path, program_runtimes: Path, pico_model: Path, prefect_server: str
) -> None:
    code = tmp_path / "code"
    for name in ("flows", "tasks", "tuneline", "infra", "tests", "docs"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    for name in ("README.md", "pipelines.yaml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, code / name)
    shutil.rmtree(code / "docs" / "images", ignore_errors=True)
    reader = Reader(tmp_path / "project", code, program_runtimes)
    versions = [sys.executable, code / "infra" / "program_versions.py"]
    subprocess.run([*versions, "--same", "all"], cwd=code, env=reader.env, check=True)  # what is being worked on is not the page's
    shutil.copytree(pico_model, reader.project / "my-model")
    seen = []
    for block in blocks("adding-a-stage.md"):
        in_project = block.file in ("poems.jsonl", "pipelines.yaml", "training.yaml") or (
            "tuneline" in block.text and block.language == "console"
        )
        reader.follow(block, reader.project if in_project else code)
        seen.append(block.language)
    assert seen.count("diff") == 4  # the union and its import: all that is touched besides the kind, its program and the version
    assert seen.count("console") == 4
    for check in ("program_versions.py", "generate_docs.py"):
        subprocess.run([sys.executable, code / "infra" / check, "--check"], cwd=code, env=reader.env, check=True)
    for kind in ("vocabulary", "dft"):
        assert f"## kind: {kind}" in (code / "docs" / "pipelines.md").read_text()
    for command in ("check", "format --check"):  # the page shows code as the project has it
        files = ["tuneline/config/spec.py", "tests/program/test_vocabulary.py"]
        files += [f"{folder}/{kind}.py" for kind in ("vocabulary", "dft") for folder in ("tuneline/kinds", "tasks/data", "tasks/training")]
        files = [file for file in files if (code / file).exists()]
        subprocess.run([Path(sys.executable).parent / "ruff", *command.split(), *files], cwd=code, check=True)
    env = {**os.environ, "PYTHONPATH": f"{code}:{ROOT / '.cache' / 'test-tools'}"}
    test = [runtime_python, "-m", "pytest", "tests/program/test_vocabulary.py", "-c", "tests/program/pytest.toml", "--rootdir", ".", "-q"]
    done = subprocess.run(test, cwd=code, env=env, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path, pico_model: Path, program_runtimes: Path, prefect_server: str) -> None:
    reader = Reader(tmp_path / "my-project", ROOT, program_runtimes)
    shutil.copytree(pico_model, reader.project / "my-model")
    ran = 0
    for block in blocks("tutorial.md"):
        reader.follow(block, reader.project)
        ran += block.language == "console"
    assert ran >= 8
    reader.run("tuneline validate gpu/pipelines.yaml", "gpu/pipelines.yaml is valid: sums (7 stages)", reader.project)


def test_the_example_for_users_of_other_tools_is_valid(tmp_path: Path) -> None:
    (example,) = [block for block in blocks("coming-from.md") if block.file]
    file = tmp_path / "pipelines.yaml"
    file.write_text(example.text, encoding="utf-8")
    assert [*load(file).spec.pipelines["chats"].stages] == ["base", "chats", "sft"]


# --- troubleshooting ----------------------------------------------------------------------------------------------------


def texts() -> str:
    """Return all strings of the code, one per line, without the placeholders of values."""
    found = []
    for file in [path for folder in ("flows", "tasks", "tuneline") for path in sorted((ROOT / folder).rglob("*.py"))]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        joined = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in joined:
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_speaks_of_messages_that_there_are() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    by_class, by_message = page.split("## By message")
    assert set(re.findall(r"^\| `(\w+)` \|", by_class, re.M)) == set(get_args(FailureClass))
    said = [message for row in re.findall(r"^\| (`.*?`) \|", by_message, re.M) for message in re.findall(r"`(.*?)`", row)]
    assert len(said) > 25
    known = texts()
    # Values are skipped: `loss is nan` matches `{name} is {value}`.
    built = {"loss is nan": "\0 is \0 at step \0"}
    unknown = [message for message in said if not all(part.strip() in known for part in built.get(message, message).split("…"))]
    assert unknown == []
