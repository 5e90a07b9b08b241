"""The commands that use what a pipeline has built: `tuneline chat | serve`. Neither imports Prefect or torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from flows.commands.exits import EXIT
from flows.commands.names import stages_of
from flows.commands.options import RunOptions, file_option, json_option, load_with_warnings, print_json, say, set_option, var_option, warn
from flows.commands.refusals import refusals_of_programs
from tuneline.config.load import load
from tuneline.errors import ConfigError, Problem
from tuneline.wording import listed
from tuneline.workspace.workspace import Workspace

HISTORY = "chat_history"


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="PIPELINE[/STAGE]...", shell_complete=stages_of)
@file_option
@click.option("--message", "-m", metavar="TEXT", help="Ask this, print the answer, and end. From a pipe, all of stdin is the question.")
@click.option("--system", metavar="TEXT", help="System prompt of the conversation.")
@click.option("--dataset", metavar="STAGE", help="Dataset of the first pipeline, whose test rows can be asked (`/row N`).")
@click.option("--row", metavar="N", help="Ask this row of the test split, by its position from 0 or its id, and end.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set temperature, top_p, max_new_tokens, seed or stop; with a dot (`sft.lora.r=8`), the override of a run.",
)
@var_option
@json_option
def chat(names: tuple[str, ...], file: Path, as_json: bool, sets: tuple[str, ...], variables: tuple[str, ...], **options: Any) -> None:
    """Talk to models that pipelines have built.

    They may be bases, adapters, merged or quantized models. Several answer the same questions, one after another. A pipeline without
    a stage is its last model. Answers are greedy, as in evaluations, unless a temperature is set.
    """
    from flows.serving.chat import Conversation, Display, members
    from flows.serving.terminal import Shown, Silent, talk
    from tuneline.planning.built import find_dataset, find_model

    overrides = tuple(each for each in sets if "." in each.partition("=")[0])
    asked = _asked(**options, sets=tuple(each for each in sets if each not in overrides))
    if as_json and asked.one_shot is None:
        raise ConfigError([Problem("", "found --json without a question", "ask with `-m TEXT`, `--row N` or from a pipe", place="--json")])
    workspace = _workspace(file, names, RunOptions(overrides, variables))
    models = [find_model(workspace, name, asked.dataset) for name in names]
    rows = find_dataset(workspace, models[0].pipeline, asked.dataset) if asked.dataset is not None else None
    with _ended_by_ctrl_c(), members(workspace, models, rows, say) as loaded:
        conversation = Conversation(loaded, asked.settings, asked.system, asked.dataset)
        if asked.one_shot is None:
            say(f"{', '.join(model.name for model in models)}: /help lists commands, Ctrl-D ends")
            talk(conversation, workspace.home / HISTORY)
            return
        shown = Shown(len(models) > 1, thoughts=sys.stdout.isatty())
        ask = conversation.ask if asked.row is None else conversation.ask_row
        display: Display = Silent() if as_json else shown
        exchange = ask(asked.one_shot, display)
        if as_json:
            print_json(asdict(exchange))
        else:
            shown.reference(exchange)
        if any(answer["ended"] == "interrupted" for answer in exchange.answers):
            sys.exit(EXIT["cancelled"])


@dataclass(frozen=True)
class Asked:
    settings: dict[str, Any]
    system: str | None
    dataset: str | None
    row: str | None
    one_shot: str | None
    """The only question, or the row; None for a conversation."""


def _asked(message: str | None, system: str | None, dataset: str | None, row: str | None, sets: tuple[str, ...]) -> Asked:
    from tuneline.workspace.sampling import checked

    if row is not None and dataset is None:
        raise ConfigError([Problem("", "found a row without a dataset", "name its stage: `--dataset NAME`", place="--row")])
    if row is not None and message is not None:
        raise ConfigError([Problem("", "found a row and a message", "give one of them", place="--row")])
    settings = {name: checked(name, value, "--set") for name, _, value in (each.partition("=") for each in sets)}
    if message is None and row is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    if message is not None and not message.strip():
        raise ConfigError([Problem("", "found an empty question", "write it after `-m`, or into the pipe", place="chat")])
    return Asked(settings, system, dataset, row, row if row is not None else message)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="PIPELINE[/STAGE]...", shell_complete=stages_of)
@file_option
@set_option
@var_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. Any but a loopback address needs a key.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--api-key", metavar="KEY", help="Key that clients must send. `ps` shows it: better set TUNELINE_API_KEY, or name a file.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="File with the key that clients must send.",
)
def serve(names: tuple[str, ...], file: Path, sets: tuple[str, ...], variables: tuple[str, ...], host: str, port: int, **key: Any) -> None:
    """Serve models that pipelines have built, by the API of OpenAI.

    vLLM serves a base and its adapters under the names given here. Ctrl-C or SIGTERM ends it once the requests in progress are done.
    """
    from flows.serving.serve import Key, address_of, served, wait
    from tuneline.planning.built import find_model

    workspace = _workspace(file, names, RunOptions(sets, variables))
    address = address_of(host, port, Key(key["api_key"], key["api_key_file"]))
    models = [find_model(workspace, name) for name in names]
    with _ended_by_ctrl_c(), served(workspace, models, address, say) as program:
        ready = program.receive()
        say(f"ready after {ready['seconds']:.0f} s: {', '.join(ready['names'])}")
        say(f"a prompt and its answer may have {ready['length']:,} tokens (`resources: {{engine: {{max_model_len: ...}}}}`)")
        say("also /health and /metrics; Ctrl-C ends it")
        click.echo(address.url())
        click.echo(address.curl(models[-1].name))
        wait(program, say)


def _workspace(file: Path, names: tuple[str, ...], options: RunOptions) -> Workspace:
    """Return the workspace; with the options, as they were given to a run, that of this run's settings. Raises ConfigError."""
    if not options.sets and not options.variables:
        return Workspace(load(file), warn)
    pipelines = list(dict.fromkeys(name.partition("/")[0] for name in names))
    if len(pipelines) > 1:
        found = f"found overrides for {len(pipelines)} pipelines, {listed(pipelines)}, expected one"
        raise ConfigError([Problem("", found, "name the stages of one pipeline", place="--set")])
    return Workspace(load_with_warnings(file, pipelines[0], options), warn)


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    try:
        with refusals_of_programs():
            yield
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(EXIT["cancelled"])
