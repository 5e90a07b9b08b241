"""The end of a command whose program refuses what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from flows.commands.exits import WRONG
from tuneline.errors import StageFailed


@contextmanager
def refusals_of_programs() -> Iterator[None]:
    """End the command with status 2 if a program refuses its configuration or its data: the call is wrong."""
    try:
        yield
    except StageFailed as error:
        if error.failure_class not in ("config", "data"):
            raise
        click.echo(str(error), err=True)
        sys.exit(WRONG)
