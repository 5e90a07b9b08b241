"""The commands that use a server: `tuneline up | down | worker | deploy | submit | doctor`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from flows.commands.exits import EXIT, FAILED
from flows.commands.names import pipelines_of
from flows.commands.options import (
    RunOptions,
    file_option,
    json_option,
    load_with_warnings,
    print_json,
    run_options,
    say,
    warn,
)
from flows.folders import home_of
from tuneline.config.load import load


@click.command()
@file_option
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Port of the server on 127.0.0.1.  [default: 4200]")
@click.option(
    "--database",
    metavar="URL",
    envvar="PREFECT_SERVER_DATABASE_CONNECTION_URL",
    show_envvar=True,
    help="Database instead of the SQLite file: postgresql+asyncpg://USER:PASSWORD@HOST/NAME. Pass a password by the environment variable.",
)
@click.option("--auth", is_flag=True, help="Protect the server with a user and a password. Prompts for both.")
@json_option
def up(file: Path, port: int | None, database: str | None, auth: bool, as_json: bool) -> None:
    """Start a persistent Prefect server with UI, and its workers.

    Starts one worker for each process pool with `local: true`. Does not restart what is already running.
    """
    from flows.server.up import up as start

    password = _password() if auth else None
    it = start(load(file), port, database, password, say)
    if as_json:
        document = {"ui": it.state.ui, "started": it.started, **it.state.model_dump()}
        print_json(document)
    else:
        click.echo(it.state.ui)
    outcome = f"started {', '.join(it.started)}" if it.started else "already running"
    click.echo(f"{outcome}; new runs use this server; `tuneline down` stops it", err=True)
    click.echo(f"for the command `prefect`: export PREFECT_API_URL={it.state.address}", err=True)


def _password() -> str:
    """Return `user:password` from PREFECT_SERVER_API_AUTH_STRING or from a prompt."""
    if given := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        return given
    user = click.prompt("user", default="tuneline", err=True)
    return f"{user}:{click.prompt('password', hide_input=True, confirmation_prompt=True, err=True)}"


@click.command()
@file_option
@json_option
def down(file: Path, as_json: bool) -> None:
    """Stop the server and the workers that `up` started.

    Runs in progress shut down gracefully.
    """
    from flows.server.up import down as end

    ended = end(file.absolute().parent)
    if as_json:
        print_json({"ended": [asdict(process) for process in ended]})
    for process in ended if not as_json else ():
        click.echo(f"ended {process.role}{f' {process.flow_run}' if process.flow_run else ''} (process {process.pid})")
    if not ended:
        click.echo("nothing is up", err=True)


@click.command()
@click.argument("pool")
@file_option
def worker(pool: str, file: Path) -> None:
    """Start a worker for a pool, in the foreground.

    For machines other than the one that runs `tuneline up`.
    """
    from flows.server.worker import run_worker

    run_worker(load(file), pool)


@click.command()
@file_option
@click.option("--dry-run", is_flag=True, help="Show what would change. Change nothing.")
@json_option
def deploy(file: Path, dry_run: bool, as_json: bool) -> None:
    """Deploy pipelines, pools and schedules to the server.

    Also deploys queues, and deletes from the server what is no longer in the file.
    """
    from flows.server.connect import connect
    from tuneline.config.schedules import check_schedules

    loaded = load(file)
    check_schedules(loaded)
    address = connect(home_of(loaded.root))
    from flows.deploy import compare as deployment
    from flows.deploy.table import deploy_table

    rows = deployment.deploy(loaded, dry_run)
    if not dry_run:
        from flows.server.workers import start_beside

        start_beside(loaded, address, say)
    if as_json:
        document = {"dry_run": dry_run, "server": address, "items": deployment.as_json(rows)}
        print_json(document)
    else:
        deploy_table(rows, dry_run)
    for pool, reason in deployment.idle(loaded).items() if not dry_run else ():
        warn(f"runs in pool {pool} will wait: {reason}")


@click.command()
@click.argument("name", metavar="PIPELINE", shell_complete=pipelines_of)
@file_option
@run_options
@click.option("--queue", help="Queue of the pool, instead of the deployment's own.")
@click.option("--watch", is_flag=True, help="Follow the run until it ends.")
@json_option
def submit(name: str, file: Path, options: RunOptions, queue: str | None, watch: bool, as_json: bool) -> None:
    """Start a run of a deployed pipeline on its pool."""
    from flows.server.connect import connect
    from tuneline.planning.plan import check_stages

    pipeline = name.split("/")[0]
    loaded = load_with_warnings(file, pipeline, options)
    check_stages(loaded, pipeline, options.only, options.force)
    connect(home_of(loaded.root))
    from flows.deploy.submit import submit as start

    state = start(loaded.file, name, options.parameters(), queue, watch, as_json)
    sys.exit(EXIT.get(state, 0))


@click.command()
@file_option
@click.option("--fix", is_flag=True, help="Set the final state on the server of runs whose process is gone.")
@click.option("--gpu", is_flag=True, help="Instead run trainings, an evaluation, a merge and GPTQ on a GPU: about ten minutes.")
@click.option(
    "--size", type=click.Choice(["full", "tiny"]), default="full", help="Models of --gpu: 1B and 8B, or pico models on any device."
)
@json_option
def doctor(file: Path, fix: bool, gpu: bool, size: str, as_json: bool) -> None:
    """Diagnose what makes runs fail or hang, and suggest fixes."""
    from flows.doctor.check import PROBLEM

    if gpu:
        from flows.doctor.gpu import examine_gpu

        checks = examine_gpu(load(file), size, say)
    else:
        from flows.doctor.machine import examine

        checks = examine(load(file), fix)
    problems = sum(check.status == PROBLEM for check in checks)
    if as_json:
        rows = [{"check": each.check, "status": each.status, "message": each.message, "remedy": each.hint} for each in checks]
        print_json({"problems": problems, "findings": rows})
    else:
        from flows.doctor.table import doctor_table

        doctor_table(checks)
    sys.exit(FAILED if problems else 0)
