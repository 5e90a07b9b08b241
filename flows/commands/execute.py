"""Run a pipeline from the command line: without Prefect if everything is cached, else through the flow, with an embedded server if
none is configured."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from flows.commands.options import RunOptions
from flows.machine import visible_gpus
from flows.report.terminal import ConsoleReporter
from flows.run.parent_watch import end_with_parent
from flows.server.connect import connect, embedded_server, find_server
from tuneline.api import WITH_PARENT
from tuneline.config.order import depends_on
from tuneline.errors import ConfigError, Problem, StageFailed, StoreError
from tuneline.kinds.gate import GateStage
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.plan import PlanRow
from tuneline.planning.verdict import judge, shown_metrics
from tuneline.workspace.artifact import Manifest
from tuneline.workspace.file_names import MANIFEST
from tuneline.workspace.runs import RunRecord, StageRecord, planned
from tuneline.workspace.runtimes import find_runtime
from tuneline.workspace.workspace import Workspace

RETRIES = "3"  # of a request to Prefect, after 2, 4 and 8 s; few, because a run makes requests at its end even if the server is gone
BUSY_SECONDS = 120  # for which a run waits to start while the server answers 503, as with SQLite under several runs


def execute(workspace: Workspace, pipeline: str, rows: list[PlanRow], options: RunOptions, verbose: bool) -> RunRecord:
    """Run the plan `rows`. Raises ConfigError before anything starts if files, runtimes or GPUs are missing."""
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        raise ConfigError(problems)
    stages = workspace.loaded.spec.pipelines[pipeline].stages
    to_run = [row for row in rows if row.status != "cached" and row.kind != "gate"]
    server = find_server(workspace.home)
    if not to_run and not server:
        return _all_cached(workspace, pipeline, rows, options.only, ConsoleReporter(verbose))
    _require_machine(workspace, pipeline, {row.stage: stage for row in to_run if isinstance(stage := stages[row.stage], ProgramStage)})
    if to_run:
        workspace.prepare_store()
    with ExitStack() as stack:
        if os.environ.pop(WITH_PARENT, None):
            end_with_parent()
        reporter = stack.enter_context(ConsoleReporter(verbose))
        _on_signals(workspace, pipeline, reporter)
        for name in ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL"):
            os.environ[name] = "CRITICAL"  # the reporter writes to the terminal; the server has the log
        logging.raiseExceptions = False  # `embedded_server` reports once that log lines do not reach the server
        if server:
            os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", RETRIES)
            connect(workspace.home)
            reporter.shows_page = True
        else:
            tell = partial(reporter.warning, "Prefect")
            with reporter.waiting("starting Prefect", "5 to 15 s; half a minute the first time on a machine"):
                stack.enter_context(embedded_server(workspace.home / "prefect", tell, workspace.loaded.spec.history))
        return _through_prefect(workspace, pipeline, reporter, options)


def _on_signals(workspace: Workspace, pipeline: str, reporter: ConsoleReporter) -> None:
    """Shut down gracefully on Ctrl-C, SIGTERM and a closed terminal (Prefect passes SIGTERM on once the flow has stopped its programs).

    A second Ctrl-C ends the process at once: its pipes close, and the watchdogs kill the programs.
    """
    interrupted = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping; press Ctrl-C again to stop at once\n")
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(ConfigError):
                record = workspace.runs.get(pipeline, reporter.run_id or "none")
                if record.state == "running":
                    workspace.runs.finish(record, "cancelled")
            reporter.console.show_cursor()
            os._exit(128 + signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)


def _all_cached(workspace: Workspace, pipeline: str, rows: list[PlanRow], only: str | None, reporter: ConsoleReporter) -> RunRecord:
    """Judge the gates, and skip the stages behind one that refuses, as the flow does."""
    with contextlib.suppress(StoreError):  # a read-only store is enough
        workspace.prepare_store()
    with workspace.store.shared_lock():  # until the record names the artifacts, `gc` must not remove them
        if gone := [row.stage for row in rows if row.artifact and not (row.artifact.path / MANIFEST).exists()]:
            raise StageFailed("transient", f"the artifact of {gone[0]} was removed from the store meanwhile", "run again")
        return _recorded(workspace, pipeline, rows, only, reporter)


def _recorded(workspace: Workspace, pipeline: str, rows: list[PlanRow], only: str | None, reporter: ConsoleReporter) -> RunRecord:
    record = workspace.runs.begin(pipeline, workspace.loaded.overrides)
    record.planned, record.only = planned(workspace.loaded.pipeline(pipeline), only), only
    stages = workspace.loaded.spec.pipelines[pipeline].stages
    manifests: dict[str, Manifest] = {}
    stopped: set[str] = set()
    for row in rows:
        stage, entry = stages[row.stage], StageRecord(stage=row.stage, kind=row.kind, status="cached")
        if absent := [need for need in depends_on(stage) if need in stopped]:
            entry.status, entry.message = "skipped", f"needs {', '.join(absent)}"
        elif isinstance(stage, GateStage):
            passed, lines = judge(stage, stages, manifests)
            entry.status, entry.message = "done" if passed else "refused", "\n".join(lines)
        elif row.artifact:
            manifests[row.stage] = row.artifact.manifest
            entry.name_artifact(row.artifact, shown_metrics(stage, row.artifact.manifest.metrics))
        if entry.status in ("skipped", "refused"):
            stopped.add(row.stage)
        record.stages.append(entry)
        if entry.message:
            reporter.finished(row.stage, entry)
    refused = any(entry.status == "refused" for entry in record.stages)
    workspace.runs.finish(record, "refused" if refused else "completed")
    return record


def _require_machine(workspace: Workspace, pipeline: str, stages: dict[str, ProgramStage]) -> None:
    """Raises ConfigError if a runtime is not set up or a GPU is missing. `validate` does not depend on the machine."""
    problems = []
    for name in sorted({name for stage in stages.values() for name in stage.runtimes()}):
        if not find_runtime(name, workspace.loaded.spec, workspace.root).ready:
            problems.append(Problem(name, "found a runtime that is not set up", f"`tuneline setup {name}` builds it", place="runtimes"))
    visible = visible_gpus()
    there = len(visible)
    for name, stage in stages.items():
        absent = [str(device) for device in stage.resources.devices or () if str(device) not in visible]
        if absent:
            found = f"found {', '.join(absent)}, but this machine shows {', '.join(visible) or 'none'}"
            problem = Problem("resources.devices", found, "name other devices, or remove `devices` to use any")
            problems.append(workspace.loaded.placed(problem, pipeline, name))
        elif stage.resources.gpus > there:
            found = f"found {stage.resources.gpus}, but this machine shows {there}"
            hint = f"`--set {name}.resources.gpus=0` runs it on the CPU, slowly"
            problems.append(workspace.loaded.placed(Problem("resources.gpus", found, hint), pipeline, name))
    if problems:
        raise ConfigError(problems)


def _through_prefect(workspace: Workspace, pipeline: str, reporter: ConsoleReporter, options: RunOptions) -> RunRecord:
    import httpx
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
    from prefect.logging.handlers import APILogHandler

    from flows.pipeline import REPORTER, run_pipeline

    token = REPORTER.set(reporter)
    parameters = {"pipeline": pipeline, "file": str(workspace.loaded.file), **options.parameters()}
    give_up = time.monotonic() + BUSY_SECONDS
    try:
        while True:
            try:
                state: Any = run_pipeline.with_options(name=pipeline)(**parameters, return_state=True)
                break
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 503 or reporter.run_id is not None or time.monotonic() > give_up:
                    raise
            time.sleep(1)
    except KeyboardInterrupt:
        if reporter.run_id is None:
            raise
        record = workspace.runs.get(pipeline, reporter.run_id)  # the flow has ended its programs and saved the record
        if record.state == "running":  # unless that was interrupted too
            workspace.runs.finish(record, "cancelled")
        return record
    except ObjectNotFound:  # the run was deleted on the server, which ends it
        if reporter.run_id is None:
            raise
        return workspace.runs.get(pipeline, reporter.run_id)
    except httpx.HTTPError as error:
        address = os.environ["PREFECT_API_URL"]
        if reporter.run_id is None:
            raise StageFailed("transient", f"the Prefect server at {address} does not answer: {_first_line(error)}", "run again") from None
        reporter.warning("Prefect", f"the server at {address} does not answer, so it does not know how this run ended")
        return workspace.runs.get(pipeline, reporter.run_id)
    finally:
        REPORTER.reset(token)
        APILogHandler().flush()
    if reporter.run_id is None:  # the flow failed before any stage could start
        state.result()
    record = workspace.runs.get(pipeline, reporter.run_id)
    if record.state == "running":  # its end could not be saved
        state.result()
    return record


def _first_line(error: Exception) -> str:
    """Return the first line of the message: Prefect adds the response and a link about its status."""
    return str(error).partition("\n")[0]
