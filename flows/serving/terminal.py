"""The terminal of `tuneline chat`: what it shows, and the commands that begin with a slash."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import click

from flows.serving.chat import Conversation, Exchange
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.wording import listed, nearest
from tuneline.workspace.sampling import Sampling, checked

HELP = """\
/set NAME VALUE  set temperature, top_p, max_new_tokens, seed or stop; without VALUE, its default again; /set alone shows all
/system TEXT     set the system prompt, and reset; /system alone removes it
/row N           ask a row of the dataset, by its position in the test split or its id
/reset           forget the conversation
/exit            end, as Ctrl-D does; Ctrl-C stops an answer, and a second one ends"""
COMMANDS = ("/set", "/system", "/row", "/reset", "/help", "/exit")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not control the terminal
REMEMBERED = 1000  # questions


class Shown:
    """Shows answers as they are written; where nobody looks (a pipe), only what is said, without thoughts and names."""

    def __init__(self, several: bool, thoughts: bool):
        self.several, self.thoughts = several, thoughts
        self._ends_line = True

    def question(self, messages: list[dict[str, Any]]) -> None:
        if self.thoughts:
            for message in messages:
                click.secho(CONTROL.sub("\ufffd", f"{message['role']}: {message['content']}"), dim=True)

    def begins(self, name: str) -> None:
        if self.several:
            click.secho(f"[{name}]", bold=True)
        self._ends_line = True

    def text(self, text: str, thoughts: bool) -> None:
        text = CONTROL.sub("\ufffd", text)
        if not thoughts or self.thoughts:
            click.echo(click.style(text, dim=True) if thoughts else text, nl=False)
            self._ends_line = text.endswith("\n")

    def answer(self, answer: dict[str, Any]) -> None:
        if not self._ends_line:
            click.echo()
        if answer["ended"] == "length":
            click.secho(f"(ends after {answer['tokens']} tokens, the maximum: max_new_tokens)", err=True, dim=True)

    def reference(self, exchange: Exchange) -> None:
        if exchange.reference is not None:
            click.secho("[reference]", bold=True)
            click.echo(exchange.reference)


class Silent:
    """Shows nothing: `--json` prints the exchange at its end."""

    def question(self, messages: list[dict[str, Any]]) -> None: ...
    def begins(self, name: str) -> None: ...
    def text(self, text: str, thoughts: bool) -> None: ...
    def answer(self, answer: dict[str, Any]) -> None: ...


def talk(conversation: Conversation, history: Path) -> None:
    """Ask what the user types until the end of the input. Keeps the questions in the file `history`, which only the user can read."""
    import readline

    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(REMEMBERED)
    shown = Shown(len(conversation.members) > 1, thoughts=True)
    try:
        while True:
            line = input("> ").strip()
            try:
                if line in ("/exit", "/quit"):
                    return
                if line.startswith("/"):
                    command(conversation, line, shown)
                elif line:
                    conversation.ask(line, shown)
            except ConfigError as error:
                click.echo(str(error), err=True)
            except StageFailed as error:
                if error.failure_class in ("bug", "oom"):  # the program may have ended
                    raise
                click.echo(str(error), err=True)
    except EOFError:
        click.echo()
    finally:
        with contextlib.suppress(OSError):
            history.touch(0o600)
            readline.write_history_file(history)


def command(conversation: Conversation, line: str, shown: Shown) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
    elif name == "/set":
        change(conversation.settings, rest)
    elif name == "/system":
        conversation.set_system(rest or None)
    elif name == "/row" and conversation.dataset is not None:
        shown.reference(conversation.ask_row(rest, shown))
    elif name == "/row":
        raise ConfigError([Problem("", "found no dataset", "start with `--dataset NAME`", place=name)])
    elif name == "/help":
        click.echo(HELP)
    else:
        raise ConfigError([Problem("", f"expected {listed(COMMANDS)}", nearest(name, COMMANDS) or "`/help` explains them", place=name)])


def change(settings: dict[str, Any], text: str) -> None:
    """Set `NAME VALUE` or `NAME=VALUE`, set NAME to its default again, or show what is set."""
    name, _, value = (text.replace("=", " ", 1) if "=" in text.partition(" ")[0] else text).partition(" ")
    if value.strip() or name not in ("", *Sampling.model_fields):
        settings[name] = checked(name, value.strip(), "/set")
    elif name:
        settings.pop(name, None)
    else:
        values = {known: " ".join(map(repr, value)) if known == "stop" else value for known, value in Sampling(**settings)}
        click.echo(", ".join(f"{known} {'unset' if value in (None, '') else value}" for known, value in values.items()))
