"""`from tuneline import load, plan, run, Run`: in a process of its own, as a subflow, interrupted and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from processes import PATIENCE, gone, until
from project import ROOT, Project

from tuneline import Run, RunFailed, load, plan, run
from tuneline.errors import ConfigError

NIGHTLY = """
from prefect import flow
import tuneline

@flow
def nightly():
    tuneline.run("demo")
    open("went-on", "w")

nightly()
"""

NESTED = """
from prefect.runtime import flow_run

@flow
def outer():
    open("outer", "w").write(flow_run.id)
    nightly()

outer()
"""


@pytest.fixture
def here(demo: Project, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(demo.root)
    return demo


def script(project: Project, text: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)], cwd=project.root, env=env, text=True, stderr=subprocess.PIPE)


@pytest.mark.process
def test_plan_run_and_what_a_run_has_made(here: Project, capfd: pytest.CaptureFixture[str]) -> None:
    assert [(row.stage, row.status) for row in plan("demo")][:2] == [("one", "run"), ("two", "run")]
    done = run("demo", overrides={"gate.require.0.at_least": 0.4})
    assert (done.state, done.stages["two"].status, done.metrics["two"]["figure"]) == ("completed", "done", 1.0)
    assert any(done.payload("two").iterdir())
    assert done.report.is_file()
    assert "two: done" in capfd.readouterr().err
    assert repr(Run.last("demo")) == repr(done) == f"Run('demo', '{done.id}', 'completed')"
    assert {row.status for row in plan("demo", only="two")} == {"cached"}
    assert load().spec.pipelines["demo"].stages["other"].kind == "dataset"
    with pytest.raises(ConfigError, match="found no artifact of `gate`, expected one, two, other, after"):
        done.payload("gate")


def test_wrong_calls_raise_before_anything_starts(here: Project) -> None:
    with pytest.raises(ConfigError, match=r"pipelines\.yaml: found no pipeline `dmo`, expected demo\n\nhint: did you mean `demo`\?"):
        run("dmo")
    with pytest.raises(ConfigError, match="found the unknown field `sourcs`"):
        plan("demo", overrides={"one.sourcs": []})
    with pytest.raises(ConfigError, match="found no stage `oe` in demo"):
        run("demo", force=["oe"])
    assert not list(here.root.glob(".tuneline/runs/*.json"))


@pytest.mark.process
def test_a_run_that_fails_raises_with_what_each_stage_said(here: Project, stand_in: Callable[..., None]) -> None:
    stand_in(one=["data", "data"])
    with pytest.raises(RunFailed, match=r"demo failed \(run .*\)\n\none: data: planted data") as caught:
        run("demo", only="two")
    assert caught.value.run.stages["two"].status == "skipped"
    assert run("demo", only="two", check=False).state == "failed"


def test_within_a_flow_it_is_a_subflow(here: Project) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client

    @flow
    def nightly() -> Any:
        return run("demo", only="one"), run("demo", only="one").stages["one"].status

    first, again = nightly()
    assert (first.state, again) == ("completed", "cached")
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(first.record.flow_run)
        assert found.parent_task_run_id is not None
        assert client.read_flow(found.flow_id).name == "demo"


def test_another_package_named_flows_is_reported(here: Project) -> None:
    (here.root / "flows").mkdir()
    (here.root / "flows" / "__init__.py").write_text("")
    process = script(here, "import flows\nfrom prefect import flow\nimport tuneline\nflow(lambda: tuneline.run('demo'))()")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "found another package `flows` imported in this process, expected tuneline's" in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "state", "end"), [(signal.SIGINT, "cancelled", "KeyboardInterrupt"), (signal.SIGKILL, "cancelled", "")])
def test_no_process_outlives_a_script_that_is_ended(
    here: Project, stand_in: Callable[..., None], number: signal.Signals, state: str, end: str
) -> None:
    stand_in(one=["sleep"])
    mark = f"{here.root.name}{os.getpid()}"
    process = script(here, "import tuneline\ntuneline.run('demo')", MARK=mark)
    until(lambda: (here.root / "calls-one").exists(), process)
    process.send_signal(number)  # to this process alone, as a notebook's stop button does
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-number if number == signal.SIGKILL else 1 if "Traceback" not in err else process.returncode)
    assert end in err
    assert gone(mark)
    assert Run.last("demo").state == state


@pytest.mark.slow
@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "")])
def test_a_signal_ends_a_flow_with_its_subflow(here: Project, stand_in: Callable[..., None], number: signal.Signals, end: str) -> None:
    from prefect.client.orchestration import get_client

    stand_in(one=["sleep"])
    mark = f"{here.root.name}{os.getpid()}"
    process = script(here, NIGHTLY, MARK=mark)
    until(lambda: (here.root / "sleeping-one").exists(), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -number
    assert end in err
    assert gone(mark)
    assert not (here.root / "went-on").exists()
    record = Run.last("demo").record
    assert record.state == "cancelled"
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(record.flow_run)
        assert found.state.is_cancelled()
        assert client.read_flow_run(client.read_task_run(found.parent_task_run_id).flow_run_id).state.is_crashed()


@pytest.mark.slow
def test_a_flow_that_is_cancelled_on_the_server_ends_with_its_subflow(here: Project, stand_in: Callable[..., None]) -> None:
    """Of two flows that call one another, the first is cancelled, which no signal reports to its process."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    stand_in(one=["sleep"])
    mark = f"{here.root.name}{os.getpid()}"
    process = script(here, NIGHTLY.removesuffix("nightly()\n") + NESTED, MARK=mark)
    until(lambda: (here.root / "sleeping-one").exists(), process)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID((here.root / "outer").read_text()), Cancelling())
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "RunFailed: demo cancelled" in err
    assert gone(mark)


@pytest.mark.full  # for two minutes afterwards, the server that all tests share records no task runs
@pytest.mark.slow
def test_a_subflow_that_is_deleted_on_the_server_raises_run_failed(here: Project, stand_in: Callable[..., None]) -> None:
    from prefect.client.orchestration import get_client

    stand_in(one=["sleep"])
    mark = f"{here.root.name}{os.getpid()}"
    process = script(here, NIGHTLY, MARK=mark)
    until(lambda: (here.root / "sleeping-one").exists(), process)
    with get_client(sync_client=True) as client:
        client.delete_flow_run(Run.last("demo").record.flow_run)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "RunFailed: demo cancelled" in err
    assert gone(mark)


def test_a_subflow_that_has_ended_counts_where_the_server_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from flows import subflow
    from flows.pipeline import REPORTER

    def ends(began: bool) -> Any:
        def flow(**_: Any) -> None:
            if began:
                REPORTER.get().began("the-run", None)
            raise httpx.ConnectError("refused")

        return SimpleNamespace(with_options=lambda name: flow)

    monkeypatch.setattr(subflow, "run_pipeline", ends(began=True))
    assert subflow.run_as_subflow("demo") == "the-run"
    monkeypatch.setattr(subflow, "run_pipeline", ends(began=False))
    with pytest.raises(httpx.ConnectError):
        subflow.run_as_subflow("demo")
