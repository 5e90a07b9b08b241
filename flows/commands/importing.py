"""The command `tuneline import`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("import", context_settings={"ignore_unknown_options": True})
@click.argument("sources", nargs=-1, required=True, metavar="FILE_OR_COMMAND...")
@click.option("--into", type=click.Path(path_type=Path, dir_okay=False), help="Pipelines file to add the pipeline to; created if missing.")
@click.option("--name", metavar="PIPELINE", default="", help="Name of the pipeline; by default that of the first file.")
def import_command(sources: tuple[str, ...], into: Path | None, name: str) -> None:
    """Translate a training of another tool to a pipeline.

    Reads a YAML file of LLaMA-Factory, axolotl or ROLL, a command or script of ms-swift or verl, or the variables of a script of your own.
    Several files become one pipeline, such as a training and its export. Put a command in quotes.

    Every key becomes a field or a comment, which says what to do instead. Prints a pipelines file, or with --into adds to one.
    """
    from tuneline.imports.compose import whole_file
    from tuneline.imports.fates import Refused
    from tuneline.imports.importing import import_sources
    from tuneline.imports.into import add_to_file

    draft = import_sources(sources, into.absolute().parent if into else Path.cwd(), name)
    if into:
        add_to_file(draft, into)
        click.echo(f"added the pipeline {draft.name} to {into}")
    else:
        click.echo(whole_file(draft), nl=False)
    refused = {note.key for note in draft.notes if isinstance(note.fate, Refused)}
    without = {note.key for note in draft.notes} - refused - draft.used
    counts = f"{len(draft.used)} keys became fields, {len(without)} have no effect here, {len(refused)} have no counterpart"
    click.echo(f"{counts}: the comments name each" if refused or without else counts, err=True)
    for path in dict.fromkeys(draft.missing):
        click.echo(f"warning: `{path}` does not exist", err=True)
