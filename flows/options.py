"""Options and exit codes that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

FAILED, WRONG, REFUSED = 1, 2, 3

file_option = click.option(
    "--file", type=click.Path(path_type=Path), default=Path("pipelines.yaml"), show_default=True, help="The pipelines file."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Prints JSON.")
