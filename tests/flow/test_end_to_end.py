"""From `up` to `down`: two deployed pipelines with schedules, a run by Prefect's own command, and a server that is killed and restarted
while a stage runs. Uses stand-ins; tests/flow/test_pico.py runs the real programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lasting import Lasting
from processes import gone, until
from project import ROOT

from flows.server import server_state

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.usefixtures("no_server_of_the_session")]
PIPELINES = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pools:
  here: {type: process, concurrency: 2, queues: {interactive: {priority: 1}, nightly: {priority: 10}}}
pipelines:
  second:
    pool: here
    queue: nightly
    schedules: {often: {interval: 6h}}
    stages:
      one: {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
  first:
    pool: here
    queue: interactive
    tags: [nightly]
    schedules:
      nightly: {cron: 0 2 * * *, timezone: Europe/Berlin, overrides: {one.seed: 4}}
      weekly: {cron: 0 4 * * 0}
    stages:
      one: {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
      two: {kind: dataset, runtime: stand-in, sources: [{type: files, path: two.txt}], needs: [one]}
"""


def schedules(place: Lasting) -> dict[str, list[str]]:
    found = place.ask("deployments/filter", {})
    return {each["name"]: sorted(schedule["slug"] for schedule in each["schedules"]) for each in found}


@pytest.fixture
def place(tmp_path: Path, no_server_of_the_session: None) -> Iterator[Lasting]:
    it = Lasting(tmp_path)
    it.project.write(PIPELINES)
    it.project.write("two", "two.txt")
    try:
        yield it
    finally:
        it.end()


def test_from_up_to_down(place: Lasting) -> None:
    project = place.project
    place.script(two=["wait"])
    place.up()
    assert {item["action"] for item in project.json("deploy")["items"]} == {"create", "change"}  # the worker has made the pool
    assert schedules(place) == {"first": ["nightly", "weekly"], "second": ["often"]}
    assert {item["action"] for item in project.json("deploy")["items"]} == {"same"}
    # The server's scheduler works: with a SQLAlchemy that Prefect did not know, it failed at each round, and only its log said so.
    planned = until(lambda: place.ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}))
    assert {run["parameters"]["pipeline"] for run in planned} <= {"first", "second"}

    environment = {**os.environ, "PREFECT_API_URL": place.address, "PREFECT_HOME": str(place.folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prefect", "deployment", "run", "first/first", "-p", 'overrides={"one.seed": 4}', "--watch"]
    watched = subprocess.Popen(command, env=environment, cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: (project.root / "waiting-two").exists())
        state = server_state.read(place.folder)
        assert state is not None
        os.kill(state.server.pid, signal.SIGKILL)  # while a stage is at work
        until(lambda: not state.server.alive)
        assert project.json("up")["started"] == ["server"]
        runs = place.ask("flow_runs/filter", {"flows": {"name": {"any_": ["first"]}}})
        (run,) = [each for each in runs if not each["auto_scheduled"]]
        project.write("", "go")
        ended = until(lambda: finished(place, run["id"]))
    finally:
        watched.kill()
        watched.communicate()
    assert ended["state"]["name"] == "Completed", ended["state"]
    assert {"nightly", "first", "tuneline"} <= set(ended["tags"])
    shown = project.json("show", "first")
    assert shown["state"] == "completed"
    assert shown["stages"]["one"]["document"]["config"]["seed"] == 4
    assert shown["stages"]["two"]["host"]["attempts"] == 1, "the stage went on without its server"

    submitted = project.json("submit", "first", "--set", "one.seed=4", "--watch")
    assert submitted["state"] == "completed"
    assert {stage["status"] for stage in project.json("plan", "first", "--set", "one.seed=4")["stages"]} == {"cached"}

    text = (project.root / "pipelines.yaml").read_text()
    project.write(text.replace("      weekly: {cron: 0 4 * * 0}\n", "").replace("    schedules: {often: {interval: 6h}}\n", ""))
    assert schedules(place) == {"first": ["nightly", "weekly"], "second": ["often"]}
    project.tuneline("deploy")
    assert schedules(place) == {"first": ["nightly"], "second": []}

    found = project.json("doctor", status=0)
    assert found["problems"] == 0
    project.tuneline("down")
    assert gone(place.mark)


def finished(place: Lasting, run_id: str) -> Any:
    run = place.ask(f"flow_runs/{run_id}")
    return run if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None
