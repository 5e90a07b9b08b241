"""Cancelling a run, however it was started and wherever it is cancelled: no process is left, record and server agree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from processes import PATIENCE, gone, until
from project import Project

from tuneline.workspace.runs import Runs, RunState


@pytest.fixture
def mark(demo: Project) -> str:
    return f"{demo.root.name}{os.getpid()}"


@pytest.fixture
def start(demo: Project, stand_in: Callable[..., None], mark: str) -> Callable[..., tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start a run whose first stage sleeps, and wait until it does. Also return its record, as JSON."""

    def started(**environment: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        stand_in(one=["sleep"])
        process = demo.start("run", "demo", MARK=mark, **environment)
        until((demo.root / "sleeping-one").exists, process)
        (run,) = demo.json("runs")
        assert run["state"] == "running"
        return process, run

    return started


def check_cancelled(demo: Project, process: subprocess.Popen[str], mark: str) -> str:
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert gone(mark)
    assert demo.json("show", "demo")["state"] == "cancelled"
    assert {stage["stage"]: stage["status"] for stage in demo.json("show", "demo")["record"]}["one"] == "cancelled"
    return err


def on_server(flow_run: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(flow_run)).state


@pytest.mark.slow
@pytest.mark.parametrize("by", ["pipeline", "run_id", "flow_run"])
def test_tuneline_cancel_ends_a_run_on_a_server(demo: Project, start: Callable[..., Any], prefect_server: str, mark: str, by: str) -> None:
    process, run = start()
    assert demo.tuneline("cancel", run[by]).stderr == f"cancelled {run['run_id']}; run again to resume\n"
    check_cancelled(demo, process, mark)
    assert on_server(run["flow_run"]).is_cancelled()
    again = demo.tuneline("cancel", run[by], status=2).stderr
    assert again.startswith(f"cancel {run[by]}: found run {run['run_id']} of demo, which has ended (cancelled), expected a run in progress")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_ends_is_cancelled_on_the_server_as_well(
    demo: Project, start: Callable[..., Any], prefect_server: str, mark: str, number: signal.Signals
) -> None:
    process, run = start()
    process.send_signal(number)
    check_cancelled(demo, process, mark)
    assert on_server(run["flow_run"]).is_cancelled()


@pytest.mark.slow
def test_tuneline_cancel_ends_a_run_with_a_server_of_its_own(demo: Project, start: Callable[..., Any], mark: str) -> None:
    process, run = start(PREFECT_API_URL="")
    assert demo.tuneline("cancel", "demo", PREFECT_API_URL="").stderr.startswith(f"cancelled {run['run_id']}")
    check_cancelled(demo, process, mark)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cancelled", "deleted"])
def test_a_run_ends_that_is_cancelled_or_deleted_on_the_server(
    demo: Project, start: Callable[..., Any], prefect_server: str, mark: str, how: str
) -> None:
    """As `prefect flow-run cancel` and the UI's buttons Cancel and Delete do."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    process, run = start()
    with get_client(sync_client=True) as client:
        if how == "deleted":
            client.delete_flow_run(UUID(run["flow_run"]))
        else:
            client.set_flow_run_state(UUID(run["flow_run"]), Cancelling())
    check_cancelled(demo, process, mark)
    if how == "cancelled":
        assert on_server(run["flow_run"]).is_cancelled()


def test_what_does_not_run_cannot_be_cancelled(demo: Project) -> None:
    stderr = demo.tuneline("cancel", "dmo", status=2, PREFECT_API_URL="").stderr
    hint = "`tuneline status` shows the runs in progress"
    assert stderr == f"cancel dmo: found no such run, expected a run in progress: none (none is defined)\n\nhint: {hint}\n"


@pytest.mark.slow
def test_status_and_logs_of_a_run_in_progress(demo: Project, start: Callable[..., Any], prefect_server: str, mark: str) -> None:
    process, run = start()
    status = demo.json("status")
    (row,) = [row for row in status["working"] if row["stage"] == "one"]  # `other` may still be at work
    assert (row["pipeline"], row["run_id"], row["stage"]) == ("demo", run["run_id"], "one")
    assert row["progress"] == "step 1 of 2, half"
    assert [each["flow_run"] for each in status["on_server"] if each["flow_run"] == run["flow_run"]]
    table = demo.tuneline("status").stdout
    assert run["run_id"] in table
    assert "step 1 of 2, half" in table
    followed = demo.start("logs", "demo", "-f", MARK=mark)
    assert followed.stdout is not None
    assert followed.stdout.readline() == "one: stand-in one: sleep\n"
    assert "stand-in one: sleep" in demo.tuneline("logs", "demo/one").stdout
    demo.tuneline("cancel", "demo")
    _out, err = followed.communicate(timeout=PATIENCE)
    assert followed.returncode == 0
    assert err == f"demo cancelled (run {run['run_id']})\n"
    check_cancelled(demo, process, mark)
    assert json.loads(demo.tuneline("status", "--json").stdout)["working"] == []


def test_a_run_that_its_worker_calls_crashed_gets_the_end_that_its_record_has(
    demo: Project, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process could not report: the server was away. A killed run is left as the worker says."""
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed, Running

    from flows.pipeline import run_pipeline
    from flows.server import unreported

    monkeypatch.setattr(unreported, "SETTLED", -1.0)
    monkeypatch.setattr(unreported, "KILLED", -1.0)
    runs = Runs(demo.root / ".tuneline" / "runs")
    watch, said = unreported.Unreported(runs), list[object]()
    with get_client(sync_client=True) as client:
        ends: dict[RunState, str] = {"completed": "Completed", "refused": "Refused", "killed": "Crashed"}
        for state, shown in ends.items():
            flow_run = client.create_flow_run(run_pipeline, parameters={"pipeline": "demo"}, state=Running())
            record = runs.begin("demo", ())
            record.flow_run = str(flow_run.id)
            runs.save(record)
            watch.look(prefect_server, said.append)  # sees it alive
            runs.finish(record, state)
            client.set_flow_run_state(flow_run.id, Crashed(), force=True)
            for _ in range(2):
                watch.look(prefect_server, said.append)
            found = client.read_flow_run(flow_run.id).state
            assert found is not None
            assert found.name == shown
        assert len(said) == 2

        # Prefect's Retry of a run has the same id: while it runs, the end of the first is not reported; its own is, once it is killed.
        flow_run = client.create_flow_run(run_pipeline, parameters={"pipeline": "demo"}, state=Running())
        for state, started in (("failed", "2026-01-01T00:00:00+00:00"), ("killed", "2026-01-01T00:01:00+00:00")):
            record = runs.begin("demo", ())
            record.flow_run, record.started = str(flow_run.id), started
            runs.save(record)
            watch.look(prefect_server, said.append)
            if state == "killed":
                found = client.read_flow_run(flow_run.id).state
                assert found is not None
                assert found.is_running()
            runs.finish(record, state)  # type: ignore[arg-type]
            if state == "killed":
                for _ in range(2):
                    watch.look(prefect_server, said.append)
        found = client.read_flow_run(flow_run.id).state
        assert found is not None
        assert (found.name, len(said)) == ("Crashed", 3)
