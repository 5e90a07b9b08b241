"""The commands that plan, run and show a pipeline: `tuneline plan | run | node | show`."""

from __future__ import annotations

import json
import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.exits import EXIT, FAILED, INTERRUPTED, WRONG
from flows.commands.names import pipelines_of, runs_of, stages_of
from flows.commands.options import (
    RunOptions,
    file_option,
    json_option,
    load_pipeline,
    load_with_warnings,
    print_json,
    run_options,
    say,
    set_option,
    var_option,
    warn,
)
from tuneline.errors import ConfigError, Problem
from tuneline.workspace.file_names import LOG, MANIFEST
from tuneline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from tuneline.estimates.estimate import Estimate
    from tuneline.planning.plan import PlanRow
    from tuneline.workspace.runs import RunRecord


@click.command()
@click.argument("pipeline", shell_complete=pipelines_of)
@file_option
@run_options
@json_option
@click.option("--online", is_flag=True, help="Read commits and config.json from the hub, to estimate memory without downloading the model.")
def plan(pipeline: str, file: Path, options: RunOptions, as_json: bool, online: bool) -> None:
    """Show what a run would do, why, and what it needs.

    Estimates memory and disk of trainings and merges. Changes nothing.
    """
    from flows.run.hub import Hub
    from tuneline.estimates import fit as fits
    from tuneline.estimates.estimate import estimates
    from tuneline.planning.plan import plan as make_plan
    from tuneline.planning.plan import refusals, unpinned
    from tuneline.workspace.hub_cache import HubCache

    workspace = Workspace(load_with_warnings(file, pipeline, options), warn, Hub() if online else HubCache())
    workspace.memory.say = say
    rows = make_plan(workspace, pipeline, options.only, options.force)
    problems = [problem for row in rows for problem in row.problems]
    if problems and not as_json:
        say(str(ConfigError(problems)))  # before the tables, which do not repeat them
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
        if problems:
            raise ConfigError(problems)  # as `run` would
        return
    from flows.report.tables import estimate_table, plan_table

    plan_table(rows)
    estimate_table({stage: each for stage, each in estimated.items() if not (problems and each.unknown)})
    if problems:
        sys.exit(WRONG)
    if not online and _waits_for_hub(workspace, pipeline, rows):
        say("unknown: `--online` asks the hub; otherwise decided when the run starts")


def _waits_for_hub(workspace: Workspace, pipeline: str, rows: list[PlanRow]) -> bool:
    """Return whether a stage is unknown because the commit of a repository is."""
    from tuneline.planning.inputs import hub_inputs

    stages = workspace.loaded.pipeline(pipeline).stages
    unknown = [stages[row.stage] for row in rows if row.status == "unknown"]
    return any(workspace.hub.commit(*wanted) is None for stage in unknown for _, *wanted in hub_inputs(workspace, stage))


@click.command()
@click.argument("pipeline", shell_complete=pipelines_of)
@file_option
@run_options
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Show the output of the programs as well.")
def run(pipeline: str, file: Path, options: RunOptions, as_json: bool, verbose: bool) -> None:
    """Run a pipeline: reuse cached stages and build the others."""
    from flows.commands.execute import execute
    from tuneline.planning.plan import plan as make_plan

    workspace = Workspace(load_with_warnings(file, pipeline, options), warn)
    workspace.memory.say = say
    rows = make_plan(workspace, pipeline, options.only, options.force)
    try:
        record = execute(workspace, pipeline, rows, options, verbose)
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


@click.command()
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
    help="Number of this machine, from 1; the run is machine 0. Required, except under Slurm and Kubernetes.",
)
def node(pipeline: str, file: Path, sets: tuple[str, ...], variables: tuple[str, ...], rank: int) -> None:
    """Join a multi-node run of a pipeline as another machine.

    Joins the current run, or waits for the next one, and ends with it. Give it the same --set and --var as the run.
    """
    from flows.run.node import check_rank, only_one, serve

    workspace = Workspace(load_pipeline(file, pipeline, RunOptions(sets, variables)), warn)
    check_rank(workspace, pipeline, rank)
    with only_one(workspace, pipeline, rank):
        record = serve(workspace, pipeline, rank, say)
    click.echo(f"{pipeline} {record.state} (run {record.run_id})", err=True)
    sys.exit(EXIT.get(record.state, FAILED))


@click.command()
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
    workspace = Workspace(load_pipeline(file, pipeline), warn)
    record = workspace.runs.get(pipeline, run_id)
    for entry in record.stages:  # the project or its store may have been moved
        if entry.artifact and entry.key and not Path(entry.artifact).exists():
            entry.artifact = str(workspace.store.folder(entry.kind, entry.key))
        if entry.key and not entry.artifact and (log := workspace.work(entry.key) / LOG).exists():  # until a run publishes the artifact
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
    path = Path(artifact, MANIFEST) if artifact else None
    return dict(json.loads(path.read_bytes())) if path and path.is_file() else None
