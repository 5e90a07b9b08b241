"""`tuneline chat` and `tuneline serve`: what they refuse at once, and chat with real programs on pico models."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pico_project import copied
from processes import gone, until
from project import ROOT, Project

CHATS = """\
version: 1
runtimes: {here: {python: bin/python}}
pipelines:
  demo:
    stages:
      base:  {kind: model, path: one.txt, runtime: here}
      rows:  {kind: dataset, model: base, sources: [{type: files, path: one.txt}], runtime: here}
      sft:   {kind: sft, model: base, dataset: rows, learning_rate: 1e-3, max_steps: 1, global_batch_size: 1, runtime: here}
  empty:
    stages:
      rows:  {kind: dataset, sources: [{type: files, path: one.txt}], runtime: here}
"""


@pytest.fixture
def unbuilt(project: Project, stand_in: Callable[..., None]) -> Project:
    project.write(CHATS)
    project.write("one", "one.txt")
    return project


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("chat", "demo/sft", "-m", "Hello"),
            "demo/sft: found nothing built (base is built first; rows is built first; no run has completed it)\n\n"
            "hint: `tuneline run demo --only sft` builds it",
        ),
        (
            ("chat", "demo/sft", "-m", "Hello", "--set", "sft.max_steps=7", "--set", "seed=1"),
            "hint: `tuneline run demo --only sft --set sft.max_steps=7` builds it",
        ),
        (
            ("serve", "demo/sft", "empty/rows", "--set", "sft.max_steps=7"),
            "--set: found overrides for 2 pipelines, demo, empty, expected one\n\nhint: name the stages of one pipeline",
        ),
        (
            ("chat", "demo", "-m", "Hello"),
            "demo/sft: found nothing built (base is built first; rows is built first; no run has completed it)",
        ),
        (
            ("serve", "demo/base"),
            "demo/base: found nothing built (no run has completed it)\n\nhint: `tuneline run demo --only base` builds it",
        ),
        (
            ("chat", "demo/rows", "-m", "Hello"),
            "demo/rows: found `rows`, expected a stage that builds a model or an adapter: base, sft",
        ),
        (("chat", "empty", "-m", "Hello"), "empty: found no stage that builds a model or an adapter"),
        (
            ("chat", "dema/sft", "-m", "Hello"),
            "pipelines.yaml: found no pipeline `dema`, expected demo, empty\n\nhint: did you mean `demo`?",
        ),
        (("chat", "demo/sft", "--row", "7"), "--row: found a row without a dataset\n\nhint: name its stage: `--dataset NAME`"),
        (("chat", "demo/sft", "-m", " "), "chat: found an empty question\n\nhint: write it after `-m`, or into the pipe"),
        (
            ("chat", "demo/sft", "-m", "a", "--set", "temperatur=1"),
            "--set: found `temperatur`, expected temperature, top_p, max_new_tokens, seed, stop\n\nhint: did you mean `temperature`?",
        ),
        (
            ("chat", "demo/sft", "-m", "a", "--set", "temperature=-1"),
            "--set: temperature: found `-1`: input should be greater than or equal to 0",
        ),
        (
            ("serve", "demo/base", "--api-key", "sesame", "--api-key-file", __file__),
            "--api-key: found --api-key and --api-key-file\n\nhint: give one of them",
        ),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(unbuilt: Project, arguments: tuple[str, ...], message: str) -> None:
    said = unbuilt.tuneline(*arguments, status=2).stderr
    assert message in said
    assert "sesame" not in said


def test_the_address_of_a_server_needs_a_key_and_a_free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.serving.serve import Key, address_of
    from tuneline.errors import ConfigError

    monkeypatch.delenv("TUNELINE_API_KEY", raising=False)
    with pytest.raises(
        ConfigError, match=r"--host: found 0\.0\.0\.0 without a key.*\n\nhint: set TUNELINE_API_KEY, or `--api-key-file FILE`"
    ):
        address_of("0.0.0.0", 8000, Key(None, None))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: 127\.0\.0\.1:{port}: Address already in use"):
            address_of("127.0.0.1", port, Key(None, None))
    with pytest.raises(ConfigError, match=r"--host: 127\.0\.0\.1\.2:8000: .*\n\nhint: `--host` takes an address of this machine"):
        address_of("127.0.0.1.2", 8000, Key(None, Path(__file__)))
    assert address_of("localhost", port, Key(None, None)).key == ""
    key = tmp_path / "my key"
    key.write_text("\n")
    with pytest.raises(ConfigError, match=r"--api-key-file: found an empty file, .*my key"):
        address_of("127.0.0.1", port, Key(None, key))
    key.write_text("sesame\n")
    address = address_of("127.0.0.1", port, Key(None, key))
    assert address.key == "sesame"
    assert address.curl("demo/sft") == (
        f"printf 'Authorization: Bearer %s' \"$(cat '{key}')\" | curl http://127.0.0.1:{port}/v1/chat/completions -H @- "
        "-H 'Content-Type: application/json' "
        """-d '{"model": "demo/sft", "messages": [{"role": "user", "content": "Hello"}]}'"""
    )
    assert address_of("127.0.0.1", port, Key("open sesame", None)).curl("a").startswith("printf 'Authorization: Bearer %s' 'open sesame' |")
    monkeypatch.setenv("TUNELINE_API_KEY", "variable")
    assert address_of("127.0.0.1", port, Key(None, None)).key == "variable"


def test_what_a_program_refuses_is_an_error_of_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.commands.refusals import refusals_of_programs
    from tuneline.errors import StageFailed

    with pytest.raises(SystemExit) as ended, refusals_of_programs():
        raise StageFailed("data", "found row 9, expected 0 to 7", "another row")
    assert (ended.value.code, capsys.readouterr().err) == (2, "found row 9, expected 0 to 7\n\nhint: another row\n")
    with pytest.raises(StageFailed), refusals_of_programs():
        raise StageFailed("bug", "the program ended with status 1")


def test_settings_are_changed_shown_and_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.serving.terminal import change

    settings: dict[str, Any] = {}
    for text in ("temperature 0.5", "stop=a = b", "seed 7", "seed"):
        change(settings, text)
    assert settings == {"temperature": 0.5, "stop": ("a = b",)}
    change(settings, "")
    assert capsys.readouterr().out == "temperature 0.5, top_p 1.0, max_new_tokens 256, seed unset, stop 'a = b'\n"


def test_a_model_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.serving.terminal import Shown

    shown = Shown(several=False, thoughts=False)
    for text in ("a\x1b[2J\tb\x07\r\n", "\x9b31m"):
        shown.text(text, False)
    shown.answer({"ended": "stop", "tokens": 2})
    assert capsys.readouterr().out == "a\ufffd[2J\tb\ufffd\ufffd\n\ufffd31m\n"


def samples(project: Project, stage: str) -> list[dict[str, Any]]:
    artifact = next(row["artifact"] for row in project.json("plan", "pico")["stages"] if row["stage"] == stage)
    return [json.loads(line) for line in Path(artifact, "meta", "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_models_answer_a_row_as_their_evaluations(pico_run: Project) -> None:
    evaluated = {"pico/sft": samples(pico_run, "eval-sft"), "pico/gptq": samples(pico_run, "eval")}
    row = evaluated["pico/sft"][1]["id"]
    found = pico_run.json("chat", *evaluated, "--dataset", "words", "--row", row)
    assert [answer["stage"] for answer in found["answers"]] == list(evaluated)
    for answer in found["answers"]:
        expected = next(sample for sample in evaluated[answer["stage"]] if sample["id"] == row)
        assert (answer["answer"], found["reference"]) == (expected["answer"], expected["reference"])
    assert not list(pico_run.root.glob(".tuneline/work/*"))


@pytest.mark.slow
def test_what_vllm_cannot_serve_is_refused_before_it_starts(pico_run: Project) -> None:
    apart = pico_run.tuneline("serve", "pico/base", "pico/merged", "--port", "18999", status=2).stderr
    assert "serve: found models of 2 bases: pico/base, pico/merged" in apart
    quantized = pico_run.tuneline("serve", "pico/gptq", "--port", "18999", status=2).stderr
    assert "pico/gptq: found GPTQ and no GPU" in quantized
    assert "hint: `tuneline chat pico/gptq` runs it" in quantized


# --- at a terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """A command at a terminal: `says` waits for text that it has not shown before."""

    def __init__(self, project: Project, mark: str, *arguments: str):
        self.main, other = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark, "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tuneline", *arguments],
            cwd=project.root,
            env=env,
            stdin=other,
            stdout=other,
            stderr=other,
            process_group=0,
        )
        os.close(other)
        self.raw, self.text, self.read = "", "", 0

    def types(self, text: str) -> None:
        os.write(self.main, f"{text}\n".encode())

    def says(self, expected: str) -> str:
        def found() -> bool:
            if expected not in self.text[self.read :] and select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.raw += os.read(self.main, 4096).decode(errors="replace")
                except OSError:  # it has ended
                    pytest.fail(f"{expected!r} is missing in {self.text!r}")
                self.text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.raw)  # without colors
            return expected in self.text[self.read :]

        until(found)
        before, _, _ = self.text[self.read :].partition(expected)
        self.read += len(before) + len(expected)
        return before

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def terminal(tmp_path: Path, pico_run: Project) -> Iterator[Callable[..., Terminal]]:
    project, made = copied(pico_run, tmp_path / "project"), []

    def start(*arguments: str) -> Terminal:
        made.append(Terminal(project, tmp_path.name, *arguments))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()
        os.close(each.main)
    assert gone(tmp_path.name)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.process
def test_a_conversation_at_a_terminal(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = terminal("chat", "pico/base", "pico/sft", "--dataset", "words")
    chat.says("pico/base, pico/sft: /help lists commands, Ctrl-D ends\r\n> ")
    chat.types("/set max_new_tokens 4")
    chat.types("Say the word number 3.")
    assert "[pico/base]" in chat.says("[pico/sft]\r\n")
    first = chat.says("\r\n")
    assert first.startswith("word")
    chat.types("/row 1")
    chat.says("[reference]\r\nword")
    chat.types("/help")
    chat.says("forget the conversation")
    chat.types("/sett")
    chat.says("/sett: expected /set, /system, /row, /reset, /help, /exit\r\n\r\nhint: did you mean `/set`?")
    chat.types("/set")
    chat.says("temperature 0.0, top_p 1.0, max_new_tokens 4, seed unset, stop unset")
    chat.types("/reset")
    chat.types("Say the word number 3.")
    chat.says("[pico/sft]\r\n")
    assert chat.says("\r\n") == first
    chat.types("/exit")
    assert chat.process.wait() == 0
    history = tmp_path / "project" / ".tuneline" / "chat_history"
    assert "Say the word number 3." in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.process
def test_ctrl_c_stops_an_answer_and_a_second_one_ends(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("chat", "pico/base")
    chat.says("\r\n> ")
    chat.types("/set max_new_tokens 1900")
    chat.types("/set temperature 1")
    chat.types("Go on.")
    chat.says("Go on.\r\n")
    chat.says(" ")
    chat.interrupt()
    chat.says("> ")
    chat.types("/set max_new_tokens 2")
    chat.types("And now?")
    chat.says("maximum: max_new_tokens")
    chat.interrupt()
    assert chat.process.wait() == 130


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.process
def test_nothing_is_left_of_a_chat_that_is_killed(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("chat", "pico/base")
    chat.says("\r\n> ")
    chat.process.kill()
