"""The command line `tuneline`: the group of its commands, and the handling of errors.

Each subject has a file: `project.py` (init, setup, validate, schema), `importing.py` (import), `export.py` (export), `runs.py` (plan,
run, node, show), `look.py` (list, runs, status, logs, cancel, completion), `serving.py` (chat, serve), `server.py` (up, down, worker,
deploy, submit, doctor), `store.py` (verify, gc).

stdout is data (tables, or JSON with --json), stderr is everything else. Exit codes: 0 done; 1 a stage failed, `verify` found damage or
`doctor` a problem; 2 the configuration or the call is wrong; 3 a gate refused; 130 interrupted. Prefect is imported only by a `run` that
builds something and by commands that use a server; torch never.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

import click

from flows.commands import meant
from flows.commands.exits import EXIT, FAILED, INTERRUPTED, WRONG
from flows.commands.export import export_command
from flows.commands.importing import import_command
from flows.commands.look import cancel, completion, list_command, logs, runs, status
from flows.commands.project import init, schema, setup, validate
from flows.commands.runs import node, plan, run, show
from flows.commands.server import deploy, doctor, down, submit, up, worker
from flows.commands.serving import chat, serve
from flows.commands.store import gc, verify
from flows.commands.streams import BrokenPipeSafe
from tuneline import __version__
from tuneline.errors import ConfigError, StoreError, TunelineError


def main() -> None:
    """Run the command line; print errors as messages, without tracebacks."""
    sys.stdout, sys.stderr = BrokenPipeSafe(sys.stdout), BrokenPipeSafe(sys.stderr)
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="tuneline"))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(0)
    except click.UsageError as error:
        hint = meant.hint(error) or (f"`{error.ctx.command_path} --help`" if error.ctx else "`tuneline --help`")
        _fail(f"{error.format_message()}\n\nhint: {hint}", WRONG)
    except click.ClickException as error:
        _fail(error.format_message(), WRONG)
    except TunelineError as error:
        _fail(str(error), WRONG if isinstance(error, ConfigError | StoreError) else FAILED)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", FAILED)
    except (KeyboardInterrupt, click.Abort):
        _fail(INTERRUPTED, EXIT["cancelled"])


def _fail(message: str, status: int) -> None:
    click.echo(message, err=True)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message=f"tuneline %(version)s, Prefect {version('prefect')}, Python {platform.python_version()}")
def cli() -> None:
    """Run cached fine-tuning pipelines that a pipelines.yaml declares."""


for _command in (init, setup, validate, schema, plan, run, node, show, list_command, runs, status, logs, cancel, completion):
    cli.add_command(_command)
for _command in (import_command, chat, serve, export_command, up, down, worker, deploy, submit, doctor, verify, gc):
    cli.add_command(_command)
