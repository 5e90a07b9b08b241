"""The commands that check and clean the store: `tuneline verify | gc`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from flows.commands.exits import FAILED
from flows.commands.options import file_option, json_option, print_json, warn
from tuneline.config.load import load
from tuneline.workspace.workspace import Workspace


@click.command()
@file_option
def verify(file: Path) -> None:
    """Compare every artifact in the store with its manifest.

    Reads every byte. Moves damaged artifacts to quarantine.
    """
    store = Workspace(load(file), warn).store
    checked = damaged = 0
    for folder in store.artifacts():
        checked += 1
        problem = store.verify(folder)
        if problem:
            damaged += 1
            click.echo(f"{folder}: {problem}")
    click.echo(f"{checked} artifacts, {damaged} damaged", err=True)
    sys.exit(FAILED if damaged else 0)


@click.command()
@file_option
@click.option(
    "--keep-last", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Number of runs to keep of each pipeline."
)
@click.option(
    "--older-than",
    metavar="AGE",
    help="Remove only what no run of the last AGE needs, and also unfinished work older than AGE: 30d, 12h, 2w.",
)
@click.option("--all", "everything", is_flag=True, help="Also remove artifacts that no run of this workspace names.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed. Change nothing.")
@json_option
def gc(file: Path, keep_last: int, older_than: str | None, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove artifacts that no kept run needs from the store.

    Keeps what the current file needs, and what these runs of each pipeline need: the last --keep-last, the last that completed, and
    those that failed or were cancelled since. Also removes the quarantine, leftovers of killed runs, and records of runs that ended
    before `history` (90 days).
    """
    from tuneline.planning import gc as collection
    from tuneline.planning.gc_runs import Policy

    policy = Policy(keep_last, collection.age(older_than) if older_than is not None else None, everything)
    items = collection.collect(Workspace(load(file), warn), policy, dry_run, warn)
    freed = sum(item.size for item in items if item.removed)
    if as_json:
        print_json({"dry_run": dry_run, "freed": freed, "items": collection.as_json(items)})
    else:
        from flows.report.tables import gc_table

        gc_table(items, dry_run)
