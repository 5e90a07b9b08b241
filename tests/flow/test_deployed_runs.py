"""Runs of deployments by a real worker, with a stand-in for the programs."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from deployments import PIPELINES, deployed, empty, server
from processes import PATIENCE, gone, until
from project import Project, place_stand_in

from tuneline.config.load import load
from tuneline.config.spec import Pipeline


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Project]:
    """A deployed project, and a worker for its pool `local` in another folder, as a user starts one."""
    project = Project(tmp_path_factory.mktemp("at-work"))
    place_stand_in(project)
    project.write(PIPELINES)
    for name in ("one", "two", "other"):
        project.write(name, f"{name}.txt")
    project.tuneline("deploy")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--type", "process", "--install-policy", "never"]
    env = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "2", "MARK": mark(project)}
    folder = project.root / "elsewhere"
    folder.mkdir()
    with (project.root / "worker.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: online("local"), process)
        yield project
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        empty()
    assert gone(mark(project))


@pytest.fixture
def working(at_work: Project) -> Project:
    """A deployed project without artifacts."""
    for path in [*at_work.root.glob("calls-*"), *at_work.root.glob("sleeping-*"), *at_work.root.glob("waiting-*"), at_work.root / "go"]:
        path.unlink(missing_ok=True)
    for name in ("one", "two", "other"):
        at_work.write(f"{name} {time.time_ns()}", f"{name}.txt")
    at_work.write("{}", "script.json")
    return at_work


def online(pool: str) -> bool:
    with server() as client:
        return any(worker.status.value == "ONLINE" for worker in client.read_workers_for_work_pool(pool))


def mark(project: Project) -> str:
    return f"{project.root.name}{os.getpid()}"


def prefect(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def logs(run_id: str) -> list[str]:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    with server() as client:
        return [log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(run_id)])))]


def state(run_id: str) -> Any:
    with server() as client:
        return client.read_flow_run(UUID(run_id)).state


@pytest.mark.slow
def test_after_a_downtime_the_newest_missed_run_of_a_schedule_runs(working: Project) -> None:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    from flows.run.missed import missed

    nightly, now = deployed()["pico/pico-nightly"], datetime.datetime.now(datetime.UTC)
    days = {"start_time": (now - datetime.timedelta(days=4)).isoformat(), "end_time": now.isoformat()}
    with server() as client:
        client.request("POST", f"/deployments/{nightly.id}/schedule", json=days)

        def due() -> list[Any]:
            its = DeploymentFilter(id=DeploymentFilterId(any_=[nightly.id]))
            runs = [run for run in client.read_flow_runs(deployment_filter=its) if run.expected_start_time < now]
            return sorted(runs, key=lambda run: run.expected_start_time)

        assert len(due()) == 3  # as many as Prefect plans at once
        until(lambda: all(run.state.is_final() for run in due()))
        assert [run.state.name for run in due()] == ["Skipped"] * 2 + ["Completed"]
        assert due()[0].state.message.startswith("missed: the run of ")
        oldest = due()[0].id
        ahead = {"start_time": now.isoformat(), "end_time": (now + datetime.timedelta(days=4)).isoformat()}
        client.request("POST", f"/deployments/{nightly.id}/schedule", json=ahead)
        its = DeploymentFilter(id=DeploymentFilterId(any_=[nightly.id]))
        planned = {str(run.id) for run in client.read_flow_runs(deployment_filter=its) if run.expected_start_time > now}
    assert len(planned) > 1
    assert len(planned & {run["flow_run"] for run in working.json("status")["on_server"]}) == 1
    assert len((working.root / "calls-one").read_text().splitlines()) == 1
    text = (working.root / "pipelines.yaml").read_text()
    for catch_up, found in (("none", "min late (catch_up: none)"), ("all", "")):
        other = load(working.write(text.replace("queue: nightly,", f"queue: nightly, catch_up: {catch_up},"), "other.yaml"))
        assert found in (missed(oldest, other.pipeline("pico")) or ""), catch_up
        assert bool(missed(oldest, other.pipeline("pico"))) == bool(found)


@pytest.mark.parametrize(("late", "skipped"), [(20, False), (3600, True)])
def test_a_run_that_starts_in_time_is_not_missed_though_the_next_one_is_due(
    monkeypatch: pytest.MonkeyPatch, late: int, skipped: bool
) -> None:
    """With an interval shorter than the start of a run, each run was replaced by the next one, and none ever worked."""
    import flows.run.missed

    now, ended = datetime.datetime.now(datetime.UTC), list[tuple[Any, str]]()
    of_schedule = {"auto_scheduled": True, "created_by": SimpleNamespace(id=1, type="SCHEDULE", display_value="often")}
    older, this, newer = (
        SimpleNamespace(
            id=uuid4(), run_count=1, deployment_id=uuid4(), expected_start_time=now - datetime.timedelta(seconds=s), **of_schedule
        )
        for s in (late + 10, late, late - 10)
    )

    class Client:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def read_flow_run(self, _: UUID) -> Any:
            return this

        def read_flow_runs(self, **_: Any) -> list[Any]:
            return [newer, this, older]

        def set_flow_run_state(self, run: UUID, state: Any, force: bool) -> None:
            ended.append((run, state.name))

    monkeypatch.setattr(flows.run.missed, "get_client", lambda sync_client: Client())
    assert bool(flows.run.missed.missed(this.id, Pipeline.model_construct())) == skipped
    assert ended == [(older.id, "Skipped")]


def test_a_server_that_does_not_answer_keeps_no_run_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    import flows.run.missed

    def away(**_: Any) -> None:
        raise httpx.ConnectError("no route")

    said: list[str] = []
    monkeypatch.setattr(flows.run.missed, "get_client", away)
    monkeypatch.setattr(flows.run.missed, "get_run_logger", lambda: SimpleNamespace(warning=said.append))
    assert flows.run.missed.missed(uuid4(), Pipeline.model_construct()) is None
    assert said == ["cannot find out whether a newer run of the schedule waits: no route"]


@contextmanager
def resumed(client: Any) -> Iterator[None]:
    """Resume the pool `local` and its queue at the end, even after a failed test."""
    from prefect.client.schemas.actions import WorkPoolUpdate

    try:
        yield
    finally:
        client.update_work_pool("local", WorkPoolUpdate(is_paused=False))
        client.request("PATCH", "/work_pools/local/queues/interactive", json={"is_paused": False})


@pytest.mark.slow
def test_a_run_that_does_not_start_says_why(working: Project) -> None:
    from prefect.client.schemas.actions import WorkPoolUpdate
    from prefect.states import Scheduled

    due = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=9)

    def reason() -> str:
        (row,) = [row for row in working.json("status")["on_server"] if row["flow_run"] == str(run.id)]
        return str(row["message"])

    with server() as client, resumed(client):
        client.update_work_pool("local", WorkPoolUpdate(is_paused=True))
        run = client.create_flow_run_from_deployment(deployed()["pico/pico"].id, state=Scheduled(scheduled_time=due))
        paused = "pool local is paused: `prefect work-pool resume local` resumes it"
        assert reason() == paused
        out, err = working.start("doctor", "--json").communicate(timeout=PATIENCE)
        assert out, err
        problems = json.loads(out)["findings"]
        (found,) = [problem for problem in problems if str(run.id) in problem["check"]]
        assert (found["status"], found["message"].split(": ", 1)[1]) == ("warning", paused)
        client.request("PATCH", "/work_pools/local/queues/interactive", json={"is_paused": True})
        client.update_work_pool("local", WorkPoolUpdate(is_paused=False))
        assert reason() == "queue interactive of pool local is paused: `prefect work-queue resume interactive --pool local` resumes it"
    until(lambda: state(str(run.id)).is_completed())


@pytest.mark.slow
def test_a_name_that_the_user_gave_stays_and_another_pipeline_is_refused(working: Project) -> None:
    done = prefect("deployment", "run", "pico/pico", "-p", 'only="one"', "--flow-run-name", "before-the-release", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    record = working.json("runs", "pico", "--last", "1")[0]
    with server() as client:
        run = client.read_flow_run(UUID(record["flow_run"]))
    assert (run.name, {"tuneline", "pico"} < set(run.tags)) == ("before-the-release", True)
    refused = prefect("deployment", "run", "pico/pico", "-p", "pipeline=other", "--watch")
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1, said
    assert "The following parameters are available on the deployment: 'overrides', 'variables', 'only', 'force'" in said
    with server() as client:
        asked = client.create_flow_run_from_deployment(deployed()["pico/pico"].id, parameters={"pipeline": "other"})
    until(lambda: state(str(asked.id)).is_final())
    assert state(str(asked.id)).is_failed()
    until(lambda: "pipeline: found other, expected pico, the pipeline of the deployment" in "\n".join(logs(str(asked.id))))


@pytest.mark.slow
def test_deployments_run_as_prefects_users_run_them(working: Project) -> None:
    done = prefect("deployment", "run", "pico/pico", "-p", 'overrides={"one.seed": 1}', "--watch")
    assert done.returncode == 0, done.stdout + done.stderr + (working.root / "worker.log").read_text()
    record = working.json("show", "pico")
    assert record["state"] == "completed"
    assert record["stages"]["one"]["document"]["config"] == {
        "seed": 1,
        **{k: v for k, v in record["stages"]["one"]["document"]["config"].items() if k != "seed"},
    }
    wrong = prefect("deployment", "run", "pico/pico", "-p", 'overrides={"one.sed": 1}', "--watch")
    assert wrong.returncode == 1
    run_id = next(part for part in wrong.stdout.split() if len(part) == 36 and part.count("-") == 4)
    assert "--set one.sed: pico.one.sed: found the unknown field `sed`" in state(run_id).message
    assert "did you mean `seed`?" in "\n".join(logs(run_id))
    assert "Traceback" not in "\n".join(logs(run_id))
    refused = prefect("deployment", "run", "pico")
    assert refused.returncode != 0  # a deployment's name has a slash: docs/operating/deploy.md


@pytest.mark.slow
def test_submit_follows_a_run_and_ends_as_it_does(working: Project) -> None:
    done = working.tuneline("submit", "pico", "--set", "one.seed=3", "--watch")
    run_id, page = done.stdout.split()
    assert page == f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{run_id}"
    assert "one: stand-in one: ok" in done.stderr
    assert done.stderr.rstrip().endswith("run Completed")
    refused = working.json("submit", "pico", "--set", "gate.require.0.at_least=2", "--queue", "nightly", "--watch", status=3)
    assert refused["state"] == "refused"
    assert "Traceback" not in "\n".join(logs(refused["flow_run_id"]))
    working.write(json.dumps({"two": ["ok", "data"]}), "script.json")
    failed = working.json("submit", "pico", "--force", "two", "--watch", status=1)
    assert failed["state"] == "failed"
    assert "planted data" in "\n".join(logs(failed["flow_run_id"]))
    scheduled = working.json("submit", "pico", "--only", "one")
    assert (scheduled["pipeline"], scheduled["state"]) == ("pico", "scheduled")
    until(lambda: state(scheduled["flow_run_id"]).is_completed())
    with server() as client:
        parameters = client.read_flow_run(UUID(refused["flow_run_id"])).parameters
    assert parameters["overrides"] == {"gate.require.0.at_least": 2}


@pytest.mark.slow
@pytest.mark.process
def test_ctrl_c_leaves_a_watched_run_going_and_says_how_to_end_it(working: Project) -> None:
    working.write(json.dumps({"one": ["sleep"]}), "script.json")
    process = working.start("submit", "pico", "--watch")
    until(lambda: (working.root / "sleeping-one").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    run_id = out.split()[0]
    assert (
        err.splitlines()[-1]
        == f"the run continues; to cancel it: PREFECT_API_URL={os.environ['PREFECT_API_URL']} prefect flow-run cancel {run_id}"
    )
    assert state(run_id).is_running()
    watcher = working.start("submit", "pico", "--json", "--watch")  # one place: it waits, and starts when the other has ended
    assert prefect("flow-run", "cancel", run_id).returncode == 0
    out, err = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 0, err
    assert state(run_id).is_cancelled()


def test_who_watches_a_run_that_is_deleted_hears_so(prefect_server: str) -> None:
    from flows.deploy.submit import follow

    said: list[str] = []
    assert follow(uuid4(), said.append) == "cancelled"
    assert [line.partition(" ")[2] for line in said] == ["run deleted on the server, which ends it"]


@pytest.mark.parametrize(("recorded", "name"), [(1, "sft: loss 0.1"), (1, "sft-8fa"), (3, "sft")])
def test_a_line_waits_until_its_task_run_is_known_or_the_run_has_ended(recorded: int, name: str) -> None:
    """Prefect records task runs later than their logs, and their names later still: a watched run was taken for deleted, and `sft` was
    called `sft-8fa`."""
    from prefect.exceptions import ObjectNotFound

    from flows.deploy.submit import LogReader

    logs = [SimpleNamespace(id=uuid4(), task_run_id=task, message=message) for task, message in ((None, "a"), (uuid4(), "b"), (None, "c"))]
    asked: list[UUID] = []

    class Client:
        def read_logs(self, _: Any, limit: int, offset: int, sort: Any) -> list[Any]:
            return logs[offset : offset + limit]

        def read_task_run(self, task_run: UUID) -> Any:
            asked.append(task_run)
            if len(asked) <= recorded:
                raise ObjectNotFound(KeyError(task_run))
            return SimpleNamespace(name=name, dynamic_key="8fa0c2d4-5d0e-4b2f-9d55-0d7c2e0a9b11")

    reader: Any = LogReader()
    found = [[stage + log.message for stage, log in reader.new(Client(), uuid4(), ended)] for ended in (False, False, True)]
    assert found == ([["a", "c"], ["sft: b"], []] if recorded == 1 else [["a", "c"], [], ["b"]])
    of_child: Any = LogReader("sft")  # whose task run need not be recorded: the run is of one stage
    asked.clear()
    assert [stage + log.message for stage, log in of_child.new(Client(), uuid4(), False)] == ["sft: a", "sft: b", "sft: c"]
    assert not asked


@pytest.mark.slow
def test_a_run_that_was_wrongly_marked_as_crashed_ends_as_it_does(working: Project) -> None:
    from prefect.states import Crashed

    working.write(json.dumps({"one": ["wait"]}), "script.json")
    run_id = working.json("submit", "pico")["flow_run_id"]
    until(lambda: (working.root / "waiting-one").exists())
    with server() as client:
        client.set_flow_run_state(UUID(run_id), Crashed(message="No sign of life"))
    assert state(run_id).is_crashed()
    working.write("", "go")
    until(lambda: state(run_id).is_completed())
