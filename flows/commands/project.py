"""The commands that set a project up: `tuneline init | setup | validate | schema`."""

from __future__ import annotations

from pathlib import Path

import click

from flows.commands.options import file_option, print_json, say, warn_of
from tuneline.config.load import load
from tuneline.errors import ConfigError, Problem


@click.command()
def init() -> None:
    """Create a starter pipelines.yaml in the current folder.

    It trains a small model on generated sums: dataset, training, evaluations, merge and gate. Also writes .tuneline/schema.json, for
    editors, and a .gitignore if there is none.
    """
    from flows.commands.starter import write_starter

    for path in write_starter(Path.cwd()):
        click.echo(path)
    click.echo("next: `tuneline setup`, then `tuneline run first`", err=True)


@click.command()
@click.argument("names", nargs=-1, metavar="[RUNTIME]...")
@file_option
def setup(names: tuple[str, ...], file: Path) -> None:
    """Build the Python environments (runtimes) of the pipelines.

    With RUNTIME, build only those. The vLLM runtimes take several GB and must be named.
    """
    from flows.commands.setup import build
    from tuneline.config.load import BUILT_IN_RUNTIMES
    from tuneline.kinds.stage import ProgramStage
    from tuneline.wording import nearest
    from tuneline.workspace.runtimes import find_runtime

    loaded = load(file)
    stages = [stage for pipeline in loaded.spec.pipelines.values() for stage in pipeline.stages.values()]
    used = sorted({stage.runtime for stage in stages if isinstance(stage, ProgramStage)})
    known = sorted({*BUILT_IN_RUNTIMES, *loaded.spec.runtimes})
    for name in names:
        if name not in known:
            found = f"found no runtime `{name}`, expected {', '.join(known)}"
            raise ConfigError([Problem("", found, nearest(name, known), place="setup")])
    for name in names or used:
        runtime = find_runtime(name, loaded.spec, loaded.root)
        build(runtime, say)
        if runtime.versions(["pydantic"]) == {"pydantic": "absent"}:
            raise ConfigError(
                [Problem(name, "found no pydantic in it, which every runtime needs", "install pydantic there", place="runtimes")]
            )
        click.echo(f"{name}  {runtime.python}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False, metavar="[FILE]")
@file_option
def validate(path: Path | None, file: Path) -> None:
    """Check a pipelines file and show every problem with its place.

    Shows all problems of fields at once, and those between stages whose fields are right.
    """
    from tuneline.config.schedules import check_schedules

    loaded = load(path or file)
    check_schedules(loaded)
    warn_of(loaded)
    counts = [f"{name} ({len(pipeline.stages)} stages)" for name, pipeline in loaded.spec.pipelines.items()]
    click.echo(f"{loaded.source.name} is valid: {', '.join(counts)}")


@click.command()
def schema() -> None:
    """Print the JSON Schema of pipelines.yaml, for editors."""
    from tuneline.config.json_schema import json_schema

    print_json(json_schema())
