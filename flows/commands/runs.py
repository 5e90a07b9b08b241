"""The command line: `tuneline init | setup | validate | plan | run | node | show | schema | verify | gc`. The commands that look at
runs are in `flows/commands/look.py`, those that speak to a server in `flows/commands/server.py`.

stdout is data (tables, or JSON with --json), stderr is everything else. Exit codes: 0 done; 1 a stage failed, `verify` found damage or
`doctor` a problem; 2 the configuration or the call is wrong; 3 a gate refused; 130 interrupted. Prefect is imported only by a `run` that
builds something and by commands that use a server; torch never.
"""

from __future__ import annotations

import json
import platform
import sys
import webbrowser
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.__main__ import INTERRUPTED
from flows.commands import meant
from flows.commands.look import cancel, completion, list_command, logs, runs, status
from flows.commands.names import pipelines_of, runs_of, stages_of
from flows.commands.options import (
    EXIT,
    FAILED,
    WRONG,
    file_option,
    force_option,
    json_option,
    load_pipeline,
    load_with_warnings,
    only_option,
    print_json,
    say,
    set_option,
    var_option,
    warn,
    warn_of,
)
from flows.commands.server import deploy, doctor, down, submit, up, worker
from flows.commands.streams import BrokenPipeSafe
from tuneline import __version__
from tuneline.config.load import load
from tuneline.errors import ConfigError, Problem, StoreError, TunelineError
from tuneline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from tuneline.estimates.estimate import Estimate
    from tuneline.planning.plan import PlanRow
    from tuneline.workspace.runs import RunRecord


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
        _fail(f"{error.filename or 'the system'}: {error.strerror}", FAILED)
    except (KeyboardInterrupt, click.Abort):
        _fail(INTERRUPTED, EXIT["cancelled"])


def _fail(message: str, status: int) -> None:
    click.echo(message, err=True)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message=f"tuneline %(version)s, Prefect {version('prefect')}, Python {platform.python_version()}")
def cli() -> None:
    """Run cached fine-tuning pipelines that a pipelines.yaml declares."""


@cli.command()
def init() -> None:
    """Create a starter pipelines.yaml in the current folder."""
    from flows.commands.starter import write_starter

    for path in write_starter(Path.cwd()):
        click.echo(path)
    click.echo("next: tuneline setup, then tuneline run first", err=True)


@cli.command()
@click.argument("names", nargs=-1, metavar="[RUNTIME]...")
@file_option
def setup(names: tuple[str, ...], file: Path) -> None:
    """Build the Python environments (runtimes) of the pipelines.

    With RUNTIME, build only those. The vLLM runtimes take several GB and must be named.
    """
    from flows.commands.setup import build
    from tuneline.config.load import BUILT_IN_RUNTIMES
    from tuneline.config.messages import nearest
    from tuneline.kinds.stage import ProgramStage
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
        build(runtime, lambda message: click.echo(message, err=True))
        if runtime.versions(["pydantic"]) == {"pydantic": "absent"}:
            raise ConfigError(
                [Problem(name, "found no pydantic in it, which every runtime needs", "install pydantic there", place="runtimes")]
            )
        click.echo(f"{name}  {runtime.python}")


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), required=False, metavar="[FILE]")
@file_option
def validate(path: Path | None, file: Path) -> None:
    """Check a pipelines file and show every problem with its place."""
    from tuneline.config.schedules import check_schedules

    loaded = load(path or file)
    check_schedules(loaded)
    warn_of(loaded)
    counts = [f"{name} ({len(pipeline.stages)} stages)" for name, pipeline in loaded.spec.pipelines.items()]
    click.echo(f"{loaded.source.name} is valid: {', '.join(counts)}")


@cli.command()
@click.argument("pipeline", shell_complete=pipelines_of)
@file_option
@set_option
@var_option
@only_option
@force_option
@json_option
@click.option("--online", is_flag=True, help="Ask the hub for current commits and for the models' config.json.")
def plan(
    pipeline: str,
    file: Path,
    sets: tuple[str, ...],
    variables: tuple[str, ...],
    only: str | None,
    force: tuple[str, ...],
    as_json: bool,
    online: bool,
) -> None:
    """Show what a run would do, why, and what it will take.

    Estimates memory and disk of trainings and merges. Changes nothing.
    """
    from flows.run.hub import Hub
    from tuneline.estimates import fit as fits
    from tuneline.estimates.estimate import estimates
    from tuneline.planning.plan import plan as make_plan
    from tuneline.planning.plan import refusals, unpinned
    from tuneline.workspace.hub_cache import HubCache

    workspace = Workspace(load_with_warnings(file, pipeline, sets, variables), warn, Hub() if online else HubCache())
    workspace.memory.say = say
    rows = make_plan(workspace, pipeline, only, force)
    estimated = estimates(workspace, pipeline, rows)
    for warning in (
        *fits.warnings(workspace, pipeline, rows),
        *unpinned(workspace, pipeline, rows),
        *refusals(workspace.loaded, pipeline, rows),
    ):
        warn(str(warning))
    if as_json:
        stages = [_plan_json(row) | {"estimate": _estimate_json(estimated.get(row.stage))} for row in rows]
        print_json({"pipeline": pipeline, "stages": stages})
    else:
        from flows.report.tables import estimate_table, plan_table

        plan_table(rows)
        estimate_table(estimated)
    if problems := [problem for row in rows for problem in row.problems]:
        raise ConfigError(problems)  # as `run` would


@cli.command()
@click.argument("pipeline", shell_complete=pipelines_of)
@file_option
@set_option
@var_option
@only_option
@force_option
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Show the output of the programs as well.")
def run(
    pipeline: str,
    file: Path,
    sets: tuple[str, ...],
    variables: tuple[str, ...],
    only: str | None,
    force: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Run a pipeline: reuse cached stages and build the others."""
    from flows.commands.execute import execute
    from tuneline.planning.plan import plan as make_plan

    workspace = Workspace(load_with_warnings(file, pipeline, sets, variables), warn)
    workspace.memory.say = say
    rows = make_plan(workspace, pipeline, only, force)
    try:
        record = execute(workspace, pipeline, rows, sets, variables, only, force, verbose)
    except KeyboardInterrupt:  # before the run began
        if as_json:
            print_json({"pipeline": pipeline, "run_id": None, "state": "cancelled", "stages": []})
        raise
    if record.state == "cancelled":
        click.echo(INTERRUPTED, err=True)
    if as_json:
        print_json(_run_json(record, rows))
    else:
        from flows.report.tables import run_table

        run_table(record.stages)
        click.echo(f"{pipeline} {record.state} (run {record.run_id})", err=True)
    _report(workspace, record)
    sys.exit(EXIT[record.state])


@cli.command()
@click.argument("pipeline", shell_complete=pipelines_of)
@file_option
@set_option
@var_option
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    required=True,
    envvar=["SLURM_PROCID", "JOB_COMPLETION_INDEX"],
    metavar="N",
    help="Number of this machine, from 1; the run is machine 0. Read from the environment under Slurm and Kubernetes.",
)
def node(pipeline: str, file: Path, sets: tuple[str, ...], variables: tuple[str, ...], rank: int) -> None:
    """Join a multi-node run of a pipeline as another machine.

    Joins the current run, or waits for the next one, and ends with it. Give it the same --set and --var as the run.
    """
    from flows.run.node import check_rank, only_one, serve

    workspace = Workspace(load_pipeline(file, pipeline, sets, variables), warn)
    check_rank(workspace, pipeline, rank)
    with only_one(workspace, pipeline, rank):
        record = serve(workspace, pipeline, rank, lambda message: click.echo(message, err=True))
    click.echo(f"{pipeline} {record.state} (run {record.run_id})", err=True)
    sys.exit(EXIT.get(record.state, FAILED))


@cli.command()
@click.argument("what", metavar="PIPELINE[/STAGE]", shell_complete=stages_of)
@file_option
@click.option("--run", "run_id", metavar="ID", shell_complete=runs_of, help="Id of the run. By default the last one.")
@click.option("--open", "in_browser", is_flag=True, help="Open the run's report in a browser.")
@json_option
def show(what: str, file: Path, run_id: str | None, in_browser: bool, as_json: bool) -> None:
    """Show the results of the last run, or of one of its stages.

    Also prints the path of the run's report.
    """
    pipeline, _, stage = what.partition("/")
    workspace = Workspace(load_pipeline(file, pipeline, (), ()), warn)
    record = workspace.runs.get(pipeline, run_id)
    for entry in record.stages:  # the project or its store may have been moved
        if entry.artifact and entry.key and not Path(entry.artifact).exists():
            entry.artifact = str(workspace.store.folder(entry.kind, entry.key))
        if (
            entry.key and not entry.artifact and (log := workspace.work(entry.key) / "log.txt").exists()
        ):  # until a run publishes the artifact
            entry.message = "; ".join(filter(None, (entry.message, f"its log is {log}")))
    records = [entry for entry in record.stages if stage in ("", entry.stage)]
    if stage and not records:
        ended = ", ".join(entry.stage for entry in record.stages) or "none, as none has ended"
        found = f"found no stage `{stage}` in run {record.run_id}, expected {ended}"
        raise ConfigError([Problem("", found, place="show")])
    manifests = {entry.stage: _manifest(entry.artifact) for entry in records}
    if as_json:
        document = _run_json(record, [])  # the outcome of each stage, beside the manifests
        document = {**document, "record": document["stages"], "stages": manifests}
        print_json(manifests[stage] if stage else document)
        if in_browser:
            _report(workspace, record, in_browser)
        return
    if stage:
        from flows.report.show import print_stage
        from flows.report.stage import stages_of

        print_stage(stages_of(record)[stage])
    else:
        from flows.report.tables import run_table

        run_table(records)
    click.echo(f"run {record.run_id}, {record.started}, {record.state}", err=True)
    _report(workspace, record, in_browser)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of pipelines.yaml, for editors."""
    from tuneline.config.json_schema import json_schema

    print_json(json_schema())


@cli.command()
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


@cli.command()
@file_option
@click.option(
    "--keep-last", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Number of runs to keep of each pipeline."
)
@click.option("--older-than", metavar="AGE", help="Also keep what runs younger than AGE need: 30d, 12h, 2w.")
@click.option("--all", "everything", is_flag=True, help="Also remove artifacts that no run of this workspace names.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed. Change nothing.")
@json_option
def gc(file: Path, keep_last: int, older_than: str | None, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove artifacts that no kept run needs from the store.

    Also removes what killed runs left behind.
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


for _command in (list_command, runs, status, logs, cancel, completion, up, down, worker, deploy, submit, doctor):
    cli.add_command(_command)


def _plan_json(row: PlanRow) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "kind": row.kind,
        "status": row.status,
        "reasons": [asdict(reason) for reason in row.reasons],
        "key": row.key,
        "artifact": str(row.artifact.path) if row.artifact else None,
        "resumes_from_step": row.checkpoint.step if row.checkpoint and not row.refused else None,
        "refused": row.refused[0] if row.refused else None,
    }


def _estimate_json(estimate: Estimate | None) -> dict[str, Any] | None:
    return estimate.as_json() if estimate else None


def _run_json(record: RunRecord, rows: list[PlanRow]) -> dict[str, Any]:
    reasons = {row.stage: [asdict(reason) for reason in row.reasons] for row in rows}
    stages = [
        {
            "stage": entry.stage,
            "kind": entry.kind,
            "status": entry.status,
            "reasons": reasons.get(entry.stage, []),
            "key": entry.key,
            "artifact": entry.artifact,
            "attempts": entry.attempts,
            "seconds": entry.seconds,
            "metrics": entry.metrics,
            "message": entry.message,
        }
        for entry in record.stages
    ]
    return {"pipeline": record.pipeline, "run_id": record.run_id, "state": record.state, "stages": stages}


def _report(workspace: Workspace, record: RunRecord, in_browser: bool = False) -> None:
    from flows.report.html import report_of

    try:
        path = report_of(workspace.runs, record)
    except OSError as error:  # the run has its result without a report
        warn(f"the report cannot be written: {error.filename}: {error.strerror}")
        return
    click.echo(f"report: {path}", err=True)
    if in_browser:
        webbrowser.open(path.as_uri())


def _manifest(artifact: str | None) -> dict[str, Any] | None:
    path = Path(artifact, "manifest.json") if artifact else None
    return dict(json.loads(path.read_bytes())) if path and path.is_file() else None
