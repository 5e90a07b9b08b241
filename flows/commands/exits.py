"""Exit codes, and the ends of commands that start programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from tuneline.errors import StageFailed

FAILED, WRONG, REFUSED = 1, 2, 3
EXIT = {"completed": 0, "failed": FAILED, "refused": REFUSED, "cancelled": 130}
INTERRUPTED = "interrupted; run again to resume"


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
