"""`tuneline list`, `runs`, `logs`, `completion`; and hints for calls of other tools."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import Project

from flows.commands import meant
from flows.commands.logs import Followed, shown
from flows.commands.main import cli
from flows.commands.options import print_json
from flows.commands.streams import BrokenPipeSafe


@pytest.fixture
def ended(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> Any:
    """A run in which one stage has failed."""
    stand_in(two=["data"])
    record, _ = run()
    assert record.state == "failed"
    return record


def test_list_shows_pipelines_and_stages_with_their_last_state(demo: Project, ended: Any) -> None:
    (row,) = demo.json("list")
    assert (row["pipeline"], row["stages"], row["run"], row["status"]) == ("demo", 5, ended.run_id, "failed")
    assert "failed" in demo.tuneline("list").stdout
    stages = {row["stage"]: row["status"] for row in demo.json("list", "demo")}
    assert stages == {"one": "done", "two": "failed", "other": "done", "gate": "skipped", "after": "skipped"}
    assert "failed" in demo.tuneline("list", "demo").stdout


def test_list_of_a_file_that_never_ran(demo: Project) -> None:
    (row,) = demo.json("list")
    assert (row["run"], row["status"], row["started"]) == (None, None, None)
    assert demo.tuneline("runs").stderr == "no run yet; `tuneline run demo` starts one\n"
    assert demo.json("runs") == []


@pytest.mark.slow
def test_runs_lists_the_newest_first(demo: Project, ended: Any, run: Callable[..., Any]) -> None:
    later, _ = run()
    rows = demo.json("runs", "demo")
    assert [row["run_id"] for row in rows] == sorted([later.run_id, ended.run_id], reverse=True)
    assert len(demo.json("runs", "--last", "1")) == 1
    table = demo.tuneline("runs").stdout
    assert ended.run_id in table
    assert "1 failed" in table


def test_logs_of_an_ended_run(demo: Project, ended: Any) -> None:
    shown = demo.tuneline("logs", "demo").stdout.splitlines()
    heads = [line for line in shown if line.startswith("==> ")]
    assert heads[0].startswith("==> one (done): .tuneline/store/dataset/")
    assert [head for head in heads if head.startswith("==> two (failed): .tuneline/work/")]
    assert "stand-in two: data" in shown
    assert demo.tuneline("logs", "demo/two").stdout.splitlines()[1:] == ["stand-in two: data"]
    assert demo.tuneline("logs", "demo/two", "-n", "1").stdout.splitlines()[1:] == ["stand-in two: data"]
    assert demo.tuneline("logs", "demo/gate").stderr.startswith("no log: no program has written one")
    wrong = demo.tuneline("logs", "demo/tow", status=2).stderr
    assert wrong.startswith("logs: found no stage `tow` in run")
    assert "did you mean `two`?" in wrong


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["ls"], "`tuneline list`"),
        (["stop"], "`tuneline cancel`"),
        (["version"], "`tuneline --version`"),
        (["start"], "`tuneline run`"),
        (["train"], "`tuneline run PIPELINE` builds every stage; `--only STAGE` builds one of kind sft and its upstream stages"),
        (["run", "demo", "--dry-run"], "`tuneline plan` shows what a run would do"),
        (["run", "demo", "sft"], "`tuneline run PIPELINE --only STAGE` runs one stage and its upstream stages"),
    ],
)
def test_calls_of_other_tools_get_a_hint(project: Project, arguments: list[str], hint: str) -> None:
    assert f"\n\nhint: {hint}" in project.tuneline(*arguments, status=2).stderr


def test_hints_name_commands_and_options_that_there_are() -> None:
    assert {name for name in meant.COMMANDS.values() if not name.startswith("--")} <= cli.commands.keys()
    assert not (meant.COMMANDS.keys() | meant.STAGES.keys()) & cli.commands.keys()


@pytest.mark.process
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tuneline lo", ["logs"]),
        ("tuneline run de", ["demo"]),
        ("tuneline run demo --only o", ["one", "other"]),
        ("tuneline logs demo/", ["demo/one", "demo/two", "demo/other", "demo/gate", "demo/after"]),
        ("tuneline run demo --file none.yaml --only o", []),
    ],
)
def test_a_shell_completes_commands_and_names(demo: Project, line: str, found: list[str]) -> None:
    words = line.split()
    env = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TUNELINE_COMPLETE": "bash_complete"}
    answered = demo.tuneline(**env).stdout.splitlines()
    assert [each.partition(",")[2] for each in answered if each] == found


def test_completion_prints_a_script_for_each_shell(project: Project) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_TUNELINE_COMPLETE" in project.tuneline("completion", shell).stdout
    script = project.tuneline("completion", "bash").stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_version_names_prefect_and_python(project: Project) -> None:
    import platform
    from importlib.metadata import version

    assert project.tuneline("--version").stdout.split(", ")[1:] == [
        f"Prefect {version('prefect')}",
        f"Python {platform.python_version()}\n",
    ]


def test_a_followed_log_loses_no_line(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_bytes(b"one\ntwo\nthr")
    with file.open("rb") as reader, file.open("ab") as writer:
        log = Followed(reader, tail=1)
        assert list(log.new(ended=False)) == ["two"]
        writer.write(b"ee\n10%\r20%\nlast words")
        writer.flush()
        assert [shown(line) for line in log.new(ended=False)] == ["three", "20%"]
        assert list(log.new(ended=True)) == ["last words"]


def test_a_stream_of_ascii_takes_any_text() -> None:
    """A pipe under LANG=C, and a file name that is invalid Unicode."""
    written = io.BytesIO()
    stream = BrokenPipeSafe(io.TextIOWrapper(written, encoding="ascii"))
    stream.write("résumé … \udcff")
    stream.flush()
    assert written.getvalue() == b"r\\xe9sum\\xe9 \\u2026 \\udcff"


def test_json_on_a_stream_of_ascii_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    print_json({"résumé": 1})
    stream.flush()
    assert json.loads(written.getvalue()) == {"résumé": 1}
