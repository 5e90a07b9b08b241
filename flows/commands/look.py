"""The commands that inspect or cancel runs: `tuneline list | runs | status | logs | cancel`; and `completion`.

Only `status` and `cancel` import Prefect, and only if there is a server.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.names import pipelines_of, runs_of, stages_of
from flows.commands.options import file_option, json_option, load_pipeline, print_json, say, warn
from tuneline.config.load import load
from tuneline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from tuneline.workspace.runs import RunRecord


@click.command("list")
@click.argument("pipeline", required=False, shell_complete=pipelines_of)
@file_option
@json_option
def list_command(pipeline: str | None, file: Path, as_json: bool) -> None:
    """List the file's pipelines and how their last runs ended.

    With PIPELINE, list its stages.
    """
    workspace = Workspace(load_pipeline(file, pipeline) if pipeline else load(file), warn)
    rows = _stages(workspace, pipeline) if pipeline else [_pipeline(workspace, name) for name in workspace.loaded.spec.pipelines]
    if as_json:
        print_json(rows)
    else:
        from flows.report.tables import list_table

        list_table(rows)


def _pipeline(workspace: Workspace, name: str) -> dict[str, Any]:
    its, run = workspace.loaded.spec.pipelines[name], next(workspace.runs.newest_first(name), None)
    last = {"run": run.run_id, "status": run.state, "started": run.started} if run else dict.fromkeys(("run", "status", "started"))
    return {"pipeline": name, "stages": len(its.stages), **last, "description": its.description}


def _stages(workspace: Workspace, pipeline: str) -> list[dict[str, Any]]:
    run = next(workspace.runs.newest_first(pipeline), None)
    last = {entry.stage: entry.status for entry in run.stages} if run else {}
    stages = workspace.loaded.spec.pipelines[pipeline].stages.items()
    return [{"stage": name, "kind": its.kind, "status": last.get(name), "description": its.description} for name, its in stages]


@click.command()
@click.argument("pipeline", required=False, shell_complete=pipelines_of)
@file_option
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="Number of runs to list.")
@json_option
def runs(pipeline: str | None, file: Path, last: int, as_json: bool) -> None:
    """List runs, newest first, with their states and times."""
    workspace = Workspace(load_pipeline(file, pipeline) if pipeline else load(file), warn)
    records = [record for record, _ in zip(workspace.runs.newest_first(pipeline), range(last), strict=False)]
    rows = [_run(record) for record in records]
    if as_json:
        print_json(rows)
    elif rows:
        from flows.report.tables import runs_table

        runs_table(rows)
    else:
        click.echo(f"no run yet; `tuneline run {pipeline or next(iter(workspace.loaded.spec.pipelines))}` starts one", err=True)


def _run(record: RunRecord) -> dict[str, Any]:
    stages = dict(Counter(stage.status for stage in record.stages))
    keys = ("run_id", "pipeline", "state", "started", "finished", "overrides", "only", "force", "flow_run")
    return {**{key: getattr(record, key) for key in keys}, "stages": stages}


@click.command()
@file_option
@json_option
def status(file: Path, as_json: bool) -> None:
    """Show the runs in progress and how far they are.

    Includes runs that wait on the server.
    """
    from flows.server import server_state
    from flows.server.connect import connect, find_server
    from flows.server.status import on_server, working

    workspace = Workspace(load(file), warn)
    here = working(workspace)
    address = find_server(workspace.home)
    if address:
        connect(workspace.home)
    there = on_server() if address else []
    if as_json:
        document = {"working": [asdict(row) for row in here], "server": address, "on_server": [asdict(row) for row in there]}
        print_json(document)
        return
    from flows.server.table import status_tables

    status_tables(here, there)
    folder = server_state.folder_of(workspace.root)
    if (state := server_state.read(folder)) and not state.server.alive:
        warn("the server that `up` started has ended: `tuneline up` starts it again, with its history")
    elif state and (origin := server_state.origin_of(folder, state)) != folder:
        warn(f"the server that `up` started writes where this folder was ({origin.parent.parent}): `tuneline up` starts it again here")
    if not here and not there:
        click.echo("no run in progress" + (f", here or on {address}" if address else ""), err=True)


@click.command()
@click.argument("what", metavar="PIPELINE[/STAGE]", shell_complete=stages_of)
@file_option
@click.option("--run", "run_id", metavar="ID", shell_complete=runs_of, help="Id of the run. By default the last one.")
@click.option("--follow", "-f", "following", is_flag=True, help="Follow new lines until the run ends.")
@click.option("--tail", "-n", type=click.IntRange(min=1), metavar="N", help="Show only the last N lines of each stage.")
def logs(what: str, file: Path, run_id: str | None, following: bool, tail: int | None) -> None:
    """Show the logs of the last run, or of one of its stages."""
    from flows.commands.logs import check_stage, follow, print_logs

    pipeline, _, stage = what.partition("/")
    workspace = Workspace(load_pipeline(file, pipeline), warn)
    record = workspace.runs.get(pipeline, run_id)
    check_stage(record, stage)
    if following and record.state == "running":
        record = follow(workspace, record, stage, tail, click.echo)
        click.echo(f"{pipeline} {record.state} (run {record.run_id})", err=True)
    elif not print_logs(workspace, record, stage, tail, click.echo):
        click.echo(f"no log: no program has written one in run {record.run_id} ({record.state})", err=True)


@click.command()
@click.argument("run", shell_complete=runs_of)
@file_option
def cancel(run: str, file: Path) -> None:
    """Cancel a run, by its id or its pipeline's name.

    Returns once its programs have ended.
    """
    from flows.server.cancellation import cancel as end

    ended = end(Workspace(load(file), warn), run, say)
    click.echo(f"cancelled {ended}; run again to resume", err=True)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell completion script.

    Load it with `source <(tuneline completion bash)`.
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root.command, {}, "tuneline", "_TUNELINE_COMPLETE").source())
