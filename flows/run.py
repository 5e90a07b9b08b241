"""One run from the command line: without Prefect where everything is cached, else through the flow, with a server of its own
where none is configured."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import Any

from flows.console import ConsoleReporter
from flows.server import embedded_server, require_server, server_configured
from tuneline.errors import ConfigError, Problem
from tuneline.gate import judge, shown_metrics
from tuneline.plan import PlanRow
from tuneline.runs import RunRecord, StageRecord
from tuneline.runtimes import find_runtime
from tuneline.spec import GateStage, ProgramStage
from tuneline.workspace import Workspace


def execute(
    workspace: Workspace,
    pipeline: str,
    rows: list[PlanRow],
    sets: tuple[str, ...],
    variables: tuple[str, ...],
    only: str | None,
    force: tuple[str, ...],
    verbose: bool,
) -> RunRecord:
    """Runs what `rows` (the plan) say. Raises ConfigError before anything starts where files or runtimes are missing."""
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        raise ConfigError(problems)
    stages = workspace.loaded.spec.pipelines[pipeline].stages
    to_run = [row for row in rows if row.status != "cached" and row.kind != "gate"]
    if not to_run and not server_configured():
        return _all_cached(workspace, pipeline, rows)
    _require_runtimes(workspace, [stage for row in to_run if isinstance(stage := stages[row.stage], ProgramStage)])
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C; Prefect hands the signal on once the flow has stopped its programs
    with ExitStack() as stack:
        reporter = stack.enter_context(ConsoleReporter(verbose))
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"  # the reporter speaks to the terminal; the server has the log
        if server_configured():
            require_server()
        else:
            reporter.console.print("starting Prefect", style="dim")
            stack.enter_context(embedded_server(workspace.home / "prefect"))
        return _through_prefect(workspace, pipeline, reporter, sets, variables, only, force)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _all_cached(workspace: Workspace, pipeline: str, rows: list[PlanRow]) -> RunRecord:
    record = workspace.runs.begin(pipeline, workspace.loaded.overrides)
    stages = workspace.loaded.spec.pipelines[pipeline].stages
    metrics: dict[str, dict[str, float]] = {}
    for row in rows:
        stage = stages[row.stage]
        if isinstance(stage, GateStage):
            passed, lines = judge(stage, metrics)
            refused_before = any(entry.status == "refused" and entry.stage in stage.needs for entry in record.stages)
            status = "skipped" if refused_before else "done" if passed else "refused"
            record.stages.append(StageRecord(stage=row.stage, kind=row.kind, status=status, message="\n".join(lines)))
            metrics[row.stage] = {}
            continue
        assert row.artifact is not None
        manifest = row.artifact.manifest
        metrics[row.stage] = shown_metrics(stage, manifest.metrics)
        entry = StageRecord(stage=row.stage, kind=row.kind, status="cached", key=row.key, digest=manifest.digest, document=row.document)
        record.stages.append(entry.model_copy(update={"artifact": str(row.artifact.path), "metrics": metrics[row.stage]}))
    refused = any(entry.status == "refused" for entry in record.stages)
    workspace.runs.finish(record, "refused" if refused else "completed")
    return record


def _require_runtimes(workspace: Workspace, stages: list[ProgramStage]) -> None:
    for name in sorted({stage.runtime for stage in stages}):
        if not find_runtime(name, workspace.loaded.spec, workspace.root).ready:
            raise ConfigError([Problem("runtimes", name, "found a runtime that is not set up", f"`tuneline setup {name}` builds it")])


def _through_prefect(
    workspace: Workspace,
    pipeline: str,
    reporter: ConsoleReporter,
    sets: tuple[str, ...],
    variables: tuple[str, ...],
    only: str | None,
    force: tuple[str, ...],
) -> RunRecord:
    from prefect.logging.handlers import APILogHandler

    from flows.pipeline import REPORTER, run_pipeline

    token = REPORTER.set(reporter)
    parameters: dict[str, Any] = {"pipeline": pipeline, "file": str(workspace.loaded.file), "only": only}
    parameters |= {"sets": list(sets), "variables": list(variables), "force": list(force)}
    try:
        state = run_pipeline.with_options(name=pipeline)(**parameters, return_state=True)
    finally:
        REPORTER.reset(token)
        APILogHandler().flush()
    if reporter.run_id is None:  # the flow itself broke before any stage could start
        state.result()
    return workspace.runs.get(pipeline, reporter.run_id)
