"""Options, exit codes and helpers that several commands share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from flows.commands.names import stages_of
from tuneline.config.load import Loaded, load

FAILED, WRONG, REFUSED = 1, 2, 3
EXIT = {"completed": 0, "failed": FAILED, "refused": REFUSED, "cancelled": 130}

file_option = click.option(
    "--file", type=click.Path(path_type=Path), default=Path("pipelines.yaml"), show_default=True, help="Path of the pipelines file."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
set_option = click.option("--set", "sets", multiple=True, metavar="STAGE.FIELD=VALUE", help="Override a field. May be repeated.")
var_option = click.option("--var", "variables", multiple=True, metavar="NAME=VALUE", help="Override a variable. May be repeated.")
only_option = click.option("--only", metavar="STAGE", shell_complete=stages_of, help="Run only this stage and its upstream stages.")
force_option = click.option(
    "--force", multiple=True, metavar="STAGE", shell_complete=stages_of, help="Rebuild this stage even if it is cached. May be repeated."
)


def print_json(document: Any) -> None:
    """Print JSON, escaped to ASCII if the stream does not take Unicode."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    click.echo(json.dumps(document, indent=1, ensure_ascii=not unicode))


def load_pipeline(file: Path, pipeline: str, sets: tuple[str, ...], variables: tuple[str, ...]) -> Loaded:
    loaded = load(file, pipeline, sets, variables)
    loaded.pipeline(pipeline)
    return loaded


def load_with_warnings(file: Path, pipeline: str, sets: tuple[str, ...], variables: tuple[str, ...]) -> Loaded:
    loaded = load_pipeline(file, pipeline, sets, variables)
    warn_of(loaded, pipeline)
    return loaded


def warn_of(loaded: Loaded, pipeline: str | None = None) -> None:
    for warning in loaded.warnings(pipeline):
        warn(str(warning))


def warn(message: str) -> None:
    say(f"warning: {message}")


def say(message: str) -> None:
    click.echo(message, err=True)
