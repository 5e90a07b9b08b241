"""From `up` to `down` with the real programs: two deployed pipelines with schedules, a run by Prefect's own command, and a server that
is killed and started anew while a model is trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lasting import Lasting, until
from pico_project import make
from processes import gone
from project import ROOT

from flows import lasting

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_server_of_the_session")]
POOLS = """\
pools:
  here: {type: process, concurrency: 2, queues: {interactive: {priority: 1}, nightly: {priority: 10}}}
pipelines:
  second:
    pool: here
    queue: nightly
    schedules: {often: {interval: 6h}}
    stages:
      base: {kind: model, path: MODEL, runtime: here}
  pico:
    pool: here
    queue: interactive
    tags: [nightly]
    schedules:
      nightly: {cron: 0 2 * * *, timezone: Europe/Berlin, overrides: {sft.lora.r: 4}}
      weekly: {cron: 0 4 * * 0}
"""


class Place(Lasting):
    """A project with the real programs; what Lasting makes in its folder is not used."""

    def __init__(self, root: Path, python: Path, model: Path):
        super().__init__(root)
        self.project = make(root / "project", python, model)
        text = (self.project.root / "pipelines.yaml").read_text()
        self.project.write(text.replace("pipelines:\n  pico:\n", POOLS.replace("MODEL", str(model))))
        self.folder = lasting.folder_of(self.project.root)

    def schedules(self) -> dict[str, list[str]]:
        found = self.ask("deployments/filter", {})
        return {each["name"]: sorted(schedule["slug"] for schedule in each["schedules"]) for each in found}


@pytest.fixture
def place(
    tmp_path: Path,
    runtime_python: Path,
    pico_model: Path,
    no_server_of_the_session: None,
) -> Iterator[Place]:
    it = Place(tmp_path, runtime_python, pico_model)
    try:
        yield it
    finally:
        it.end()


def test_from_up_to_down(place: Place) -> None:
    project = place.project
    place.up()
    assert {item["action"] for item in project.json("deploy")["items"]} == {"create", "change"}  # the worker has made the pool
    assert place.schedules() == {"pico": ["nightly", "weekly"], "second": ["often"]}
    assert {item["action"] for item in project.json("deploy")["items"]} == {"same"}
    # The server's scheduler works: with a SQLAlchemy that Prefect did not know, it failed at each round, and only its log said so.
    planned = until(lambda: place.ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}), 180)
    assert {run["parameters"]["pipeline"] for run in planned} <= {"pico", "second"}

    environment = {**os.environ, "PREFECT_API_URL": place.address, "PREFECT_HOME": str(place.folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prefect", "deployment", "run", "pico/pico", "-p", 'overrides={"sft.lora.r": 4}', "--watch"]
    watched = subprocess.Popen(command, env=environment, cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: list(project.root.glob(".tuneline/work/*/checkpoints/checkpoint-*/complete")), 300)
        state = lasting.read(place.folder)
        assert state is not None
        os.kill(state.server.pid, signal.SIGKILL)  # in the middle of a training
        until(lambda: not state.server.alive, 10)
        assert project.json("up")["started"] == ["server"]
        runs = place.ask("flow_runs/filter", {"flows": {"name": {"any_": ["pico"]}}})
        (run,) = [each for each in runs if not each["auto_scheduled"]]
        ended = until(lambda: finished(place, run["id"]), 600)
    finally:
        watched.kill()
        watched.communicate()
    assert ended["state"]["name"] == "Completed", ended["state"]
    assert {"nightly", "pico", "tuneline"} <= set(ended["tags"])
    shown = project.json("show", "pico")
    assert shown["state"] == "completed"
    assert shown["stages"]["sft"]["document"]["config"]["lora"]["r"] == 4
    assert shown["stages"]["sft"]["host"]["attempts"] == 1, "the training went on without its server"

    submitted = project.json("submit", "pico", "--set", "sft.lora.r=4", "--watch")
    assert submitted["state"] == "completed"
    assert {stage["status"] for stage in project.json("plan", "pico", "--set", "sft.lora.r=4")["stages"] if stage["kind"] != "gate"} == {
        "cached"
    }

    text = (project.root / "pipelines.yaml").read_text()
    project.write(text.replace("      weekly: {cron: 0 4 * * 0}\n", "").replace("    schedules: {often: {interval: 6h}}\n", ""))
    assert place.schedules() == {"pico": ["nightly", "weekly"], "second": ["often"]}
    project.tuneline("deploy")
    assert place.schedules() == {"pico": ["nightly"], "second": []}

    found = project.json("doctor", status=0)
    assert found["problems"] == 0
    project.tuneline("down")
    assert gone(place.mark)


def finished(place: Place, run_id: str) -> Any:
    run = place.ask(f"flow_runs/{run_id}")
    return run if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None
