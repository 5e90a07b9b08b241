"""Pools on real processes: stages in another pool, waiting for GPUs, and which process ends which.

The module has one server, two workers and a deployed pipeline of stand-ins; each test uses its own pipelines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from processes import PATIENCE
from project import ROOT, Project, place_stand_in

from tuneline.config.load import load
from tuneline.workspace.runs import RunRecord
from tuneline.workspace.workspace import Workspace

pytestmark = pytest.mark.slow
ONE = "{kind: dataset, runtime: stand-in, sources: [{type: files, path: NAME.txt}]"
PIPELINES = f"""\
version: 1
runtimes: {{stand-in: {{python: bin/python}}}}
pools:
  cpu: {{type: process}}
  gpu: {{type: process, concurrency: 2}}
  idle: {{type: process}}
pipelines:
  split:
    pool: cpu
    stages:
      one: {ONE.replace("NAME", "one")}}}
      two: {ONE.replace("NAME", "two")}, needs: [one], pool: gpu, resources: {{gpus: 1}}}}
      three: {ONE.replace("NAME", "three")}, needs: [two]}}
  waiting:
    pool: cpu
    stages:
      first: {ONE.replace("NAME", "first")}, pool: idle}}
  single:
    pool: cpu
    stages:
      alone: {ONE.replace("NAME", "alone")}, resources: {{gpus: 1}}}}
"""


class Cluster:
    """The project with its server and workers."""

    def __init__(self, project: Project, address: str):
        self.project, self.address = project, address
        self.mark = f"{project.root.name}{os.getpid()}"
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            **os.environ,
            "PREFECT_API_URL": address,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_HOME": str(project.root / "prefect"),
            "PYTHONPATH": str(ROOT),
            "TUNELINE_GPUS": "1",
            "TUNELINE_MARK": self.mark,
        }

    def start_worker(self, pool: str) -> None:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", f"{pool}-worker"]
        with (self.project.root / f"worker-{pool}.log").open("ab") as log:
            self.workers[pool] = subprocess.Popen(command, env=self.env, cwd=self.project.root, stdout=log, stderr=log)

    def stop(self) -> None:
        for worker in self.workers.values():
            with suppress(ProcessLookupError):
                worker.terminate()
        for worker in self.workers.values():
            worker.wait(PATIENCE)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, *texts: str) -> list[int]:
        """Return this project's processes with all of the given texts in their command lines."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                environment = Path(f"/proc/{name}/environ").read_bytes()
                line = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if f"TUNELINE_MARK={self.mark}".encode() in environment and all(text in line for text in texts):
                    found.append(int(name))
        return found

    def submit(self, pipeline: str, **parameters: Any) -> UUID:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"{pipeline}/{pipeline}")
            given = {**deployment.parameters, **parameters}
            return client.create_flow_run_from_deployment(deployment.id, parameters=given).id

    def state(self, flow_run: UUID) -> Any:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            return client.read_flow_run(flow_run).state

    def end(self, flow_run: UUID) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (state := self.state(flow_run)).is_final():
            assert time.monotonic() < deadline, f"still {state.name}\n{self.logs(flow_run)}"
            time.sleep(0.5)
        return state

    def logs(self, flow_run: UUID) -> str:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

        with get_client(sync_client=True) as client:
            return "\n".join(entry.message for entry in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run]))))

    def delete_runs(self) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

        with get_client(sync_client=True) as client:
            flows = FlowFilter.model_validate({"name": {"any_": ["split", "waiting", "single", "run-stage"]}})
            unfinished = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]}}}
            for run in client.read_flow_runs(flow_filter=flows, flow_run_filter=FlowRunFilter.model_validate(unfinished)):
                client.delete_flow_run(run.id)

    def children(self, flow_run: UUID) -> list[Any]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

        with get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run])))

    def record(self, pipeline: str) -> RunRecord:
        return Workspace(load(self.project.root / "pipelines.yaml")).runs.get(pipeline, None)

    def wait_for(self, what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, f"it did not happen\n{self.worker_logs()}"
            time.sleep(0.2)
        return found

    def worker_logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in self.project.root.glob("worker-*.log"))

    def process_of(self, flow_run: UUID) -> int:
        variable = f"PREFECT__FLOW_RUN_ID={flow_run}".encode()
        return next(pid for pid in self.processes("prefect.engine") if variable in Path(f"/proc/{pid}/environ").read_bytes())

    def sleeping(self, name: str) -> bool:
        return (self.project.root / f"sleeping-{name}").exists()

    def fresh(self, **actions: list[Any]) -> None:
        """End the processes of earlier tests, remove all artifacts, and set what the stand-ins do."""
        root = self.project.root
        self.delete_runs()
        for pid in self.processes("prefect.engine"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for(lambda: not self.processes("prefect.engine") and not self.processes("stand_in.py"))
        for path in [*root.glob("calls-*"), *root.glob("sleeping-*"), *root.glob("waiting-*"), root / "go"]:
            path.unlink(missing_ok=True)
        for name in ("one", "two", "three", "first", "alone"):
            self.project.write(f"{name} {time.time_ns()}", f"{name}.txt")
        self.project.write(json.dumps(actions), "script.json")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Cluster]:
    project = Project(tmp_path_factory.mktemp("pools"))
    place_stand_in(project)
    project.write(PIPELINES)
    cluster = Cluster(project, prefect_server)
    cluster.fresh()
    project.tuneline("deploy", PREFECT_API_URL=prefect_server)
    try:
        for pool in ("cpu", "gpu"):
            cluster.start_worker(pool)
        yield cluster
    finally:
        cluster.stop()


def statuses(record: RunRecord) -> dict[str, str]:
    return {stage.stage: stage.status for stage in record.stages}


def test_a_stage_runs_in_its_own_pool_and_comes_back(cluster: Cluster) -> None:
    cluster.fresh()
    parent = cluster.submit("split")
    assert cluster.end(parent).name == "Completed", cluster.logs(parent)
    record = cluster.record("split")
    assert statuses(record) == {"one": "done", "two": "done", "three": "done"}
    (child,) = cluster.children(parent)
    assert (child.work_pool_name, child.state.name) == ("gpu", "Completed")
    assert f"runs in pool gpu: flow run {child.name}, {child.id}" in cluster.logs(parent)
    assert "stand-in two: ok" in cluster.logs(child.id)
    assert "stand-in two: ok" not in cluster.logs(parent)
    two = next(stage for stage in record.stages if stage.stage == "two")
    assert two.artifact is not None
    assert Path(two.artifact, "payload", "data.json").exists()
    again = cluster.submit("split")
    assert cluster.end(again).name == "Completed"
    assert cluster.children(again) == [], "what is cached needs no pool"


def test_who_watches_a_run_hears_of_its_stages_in_other_pools(cluster: Cluster) -> None:
    cluster.fresh(first=["wait"])
    watcher = cluster.project.start("submit", "waiting", "--watch", PREFECT_API_URL=cluster.address)
    assert watcher.stderr is not None
    heard: list[str] = []

    def hear(words: str) -> None:
        while not heard or words not in heard[-1]:
            line = watcher.stderr.readline()  # type: ignore[union-attr]
            assert line, "".join(heard)
            heard.append(line)

    hear("first: in pool idle: scheduled, no worker is online: `tuneline worker idle` starts one")
    cluster.start_worker("idle")
    hear("first: in pool idle: running")
    cluster.project.write("", "go")
    _, err = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 0, err
    for words in ("first: stand-in first: wait", "first: in pool idle: completed", "run Completed"):
        assert any(line.partition(" ")[2].strip() == words for line in [*heard, *err.splitlines()]), (words, heard, err)


def test_a_childs_failure_comes_back_with_its_class(cluster: Cluster) -> None:
    cluster.fresh(two=["data"])
    parent = cluster.submit("split")
    assert cluster.end(parent).is_failed()
    record = cluster.record("split")
    assert statuses(record) == {"one": "done", "two": "failed", "three": "skipped"}
    assert record.stages[1].message == "data: planted data\n\nhint: none"
    assert len(cluster.children(parent)) == 1, "what the child has tried is not tried again by the parent"


def test_a_child_refuses_another_key(cluster: Cluster) -> None:
    from prefect.client.orchestration import get_client

    cluster.fresh()
    parameters = {"pipeline": "split", "file": str(cluster.project.root / "pipelines.yaml"), "stage": "two", "run_id": "r", "inputs": {}}
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("run-stage/run-stage-gpu")
        flow_run = client.create_flow_run_from_deployment(deployment.id, parameters={**parameters, "key": "f" * 64}).id
    state = cluster.end(flow_run)
    assert state.is_failed()
    assert state.message.startswith("config: found the key ")
    assert "expected ffffffffffff" in state.message


def test_cancelling_the_parent_cancels_the_child(cluster: Cluster) -> None:
    cluster.fresh(two=["sleep"])
    parent = cluster.submit("split")
    cluster.wait_for(lambda: cluster.sleeping("two"))
    subprocess.run([sys.executable, "-m", "prefect", "flow-run", "cancel", str(parent)], env=cluster.env, check=True, capture_output=True)
    cluster.wait_for(lambda: not cluster.processes("stand_in.py") and not cluster.processes("sleep 1000"))
    assert cluster.end(parent).is_cancelled()
    (child,) = cluster.children(parent)
    assert cluster.end(child.id).is_cancelled()
    cluster.fresh()


def test_a_gpu_is_waited_for_between_runs(cluster: Cluster) -> None:
    cluster.fresh(alone=["wait"])
    first = cluster.submit("single")
    cluster.wait_for(lambda: (cluster.project.root / "waiting-alone").exists())
    second = cluster.submit("split")
    cluster.wait_for(lambda: cluster.children(second))
    (child,) = cluster.children(second)
    cluster.wait_for(lambda: "waits for 1 of GPU 0: 0 is held by single/alone (process" in cluster.logs(child.id))
    assert not (cluster.project.root / "calls-two").exists()
    (cluster.project.root / "go").write_text("")
    assert cluster.end(first).is_completed()
    assert cluster.end(second).is_completed()


# --- deaths -----------------------------------------------------------------------------------------------------------


def test_a_killed_flow_process_leaves_no_program(cluster: Cluster) -> None:
    cluster.fresh(alone=["sleep"])
    flow_run = cluster.submit("single")
    cluster.wait_for(lambda: cluster.sleeping("alone"))
    (watchdog,) = cluster.processes("watchdog.py", "-m tasks")
    flow = int(Path(f"/proc/{watchdog}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(flow, signal.SIGKILL)
    cluster.wait_for(lambda: not cluster.processes("stand_in.py") and not cluster.processes("sleep 1000"))
    assert cluster.end(flow_run).is_crashed(), "its worker has seen it die"
    again = cluster.submit("single")
    assert cluster.end(again).is_completed()


def test_a_parent_that_is_killed_with_its_worker_ends_its_child(cluster: Cluster) -> None:
    """Nobody reports the parent's end then: for three minutes it is Running on the server."""
    cluster.fresh(two=["sleep"])
    parent = cluster.submit("split")
    cluster.wait_for(lambda: cluster.sleeping("two"))
    (child,) = cluster.children(parent)
    flow = cluster.process_of(parent)
    cluster.workers["cpu"].kill()
    os.kill(flow, signal.SIGKILL)
    cluster.workers["cpu"].wait()
    try:
        cluster.wait_for(lambda: not cluster.processes("stand_in.py") and not cluster.processes("sleep 1000"))
        assert cluster.state(parent).is_running()
        assert cluster.end(child.id).is_cancelled()
        assert cluster.record("split").state == "killed"
    finally:
        cluster.start_worker("cpu")
    cluster.fresh()


def test_a_killed_worker_leaves_no_orphan(cluster: Cluster) -> None:
    cluster.fresh(alone=["sleep"])
    flow_run = cluster.submit("single")
    cluster.wait_for(lambda: cluster.sleeping("alone"))
    cluster.workers["cpu"].kill()
    cluster.workers["cpu"].wait()
    try:
        cluster.wait_for(lambda: not cluster.processes("stand_in.py") and not cluster.processes("sleep 1000"))
        assert cluster.end(flow_run).is_cancelled(), "as its record says: it has ended in order"
    finally:
        cluster.start_worker("cpu")
    again = cluster.submit("single")
    assert cluster.end(again).is_completed()
