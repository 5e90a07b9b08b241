"""Options and helpers that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from flows.commands.names import stages_of
from tuneline.config.load import Loaded, load
from tuneline.config.overrides import as_overrides

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


@dataclass(frozen=True)
class RunOptions:
    """The options --set, --var, --only and --force of a run."""

    sets: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    only: str | None = None
    force: tuple[str, ...] = ()

    def parameters(self) -> dict[str, Any]:
        """Return them as parameters of the flow `run_pipeline`."""
        overrides, variables = as_overrides("--set", self.sets), as_overrides("--var", self.variables)
        return {"overrides": overrides, "variables": variables, "only": self.only, "force": list(self.force)}


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --set, --var, --only and --force to a command, which gets them as the parameter `options`."""

    @wraps(command)
    def with_options(
        *arguments: Any, sets: tuple[str, ...], variables: tuple[str, ...], only: str | None, force: tuple[str, ...], **others: Any
    ) -> None:
        command(*arguments, options=RunOptions(sets, variables, only, force), **others)

    return set_option(var_option(only_option(force_option(with_options))))


def print_json(document: Any) -> None:
    """Print JSON, escaped to ASCII if the stream does not take Unicode."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    click.echo(json.dumps(document, indent=1, ensure_ascii=not unicode))


def load_pipeline(file: Path, pipeline: str, options: RunOptions = RunOptions()) -> Loaded:
    """Load the file and raise ConfigError if it has no such pipeline."""
    loaded = load(file, pipeline, options.sets, options.variables)
    loaded.pipeline(pipeline)
    return loaded


def load_with_warnings(file: Path, pipeline: str, options: RunOptions) -> Loaded:
    loaded = load_pipeline(file, pipeline, options)
    warn_of(loaded, pipeline)
    return loaded


def warn_of(loaded: Loaded, pipeline: str | None = None) -> None:
    for warning in loaded.warnings(pipeline):
        warn(str(warning))


def warn(message: str) -> None:
    say(f"warning: {message}")


def say(message: str) -> None:
    click.echo(message, err=True)
