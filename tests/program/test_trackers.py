"""Trainings that report to trackers: curves as the history has them, over resumes, and trackers that fail without an effect."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import until
from program_tools import ROOT, payload_digest, program_environment, run_program, run_until
from sft_tools import request_for
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tuneline.kinds.trackers import Track
from tuneline.workspace.protocol import Input, Request
from tuneline.workspace.tracked import tracked

NAME = "demo/sft/20260101T000000000Z-abcd"
FIELDS: dict[str, Any] = {"max_steps": 6, "resources": {"checkpoint_steps": 2}}


def track(**trackers: Any) -> dict[str, Any]:
    return {"name": NAME, "track": Track.model_validate(trackers)}


def curve(folder: Path, tag: str) -> dict[int, float]:
    """Read as TensorBoard does: a session that starts at a step makes it forget that step and later ones."""
    found: dict[int, float] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns):
        for event in events_of(file.read_bytes()):
            if event.session_log.status == SessionLog.START:
                found = {step: value for step, value in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = value.simple_value
    return found


def events_of(content: bytes) -> Iterator[Any]:
    """Yield the records of a TFRecord file: a length, its checksum, the record, its checksum."""
    at = 0
    while at < len(content):
        length = struct.unpack_from("<Q", content, at)[0]
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def test_a_curve_goes_on_after_a_kill_and_a_missing_package_is_a_warning(tmp_path: Path, base: Input) -> None:
    """Tracking changes no byte of the adapter, either."""
    trackers = track(tensorboard={"log_dir": str(tmp_path / "curves")}, wandb={}, mlflow={"tracking_uri": "http://localhost:1"})
    plain, tracking = (request_for(tmp_path / name, base, **FIELDS) for name in ("plain", "tracking"))
    tracking = tracking.model_copy(update=trackers)
    run_program(plain)
    run_until(tracking, 5)
    until(lambda: 4 in curve(tmp_path / "curves" / NAME, "train/loss"))  # its thread lives on in this process
    later = tracking.model_copy(update={"name": "demo/sft/another-run"})
    _, events = run_program(later)
    history = [json.loads(line) for line in (later.meta / "history.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert len(losses) == 6
    assert curve(tmp_path / "curves" / NAME, "train/loss") == pytest.approx(losses)
    assert payload_digest(tracking) == payload_digest(plain)
    assert tracked(tracking.work).links == {"tensorboard": f"tensorboard --logdir {tmp_path / 'curves'}"}
    warnings = {event["message"] for event in events if event["type"] == "warning"}
    for package in ("wandb", "mlflow"):
        assert any(message.startswith(f"{package}: the stage's runtime has no package `{package}`") for message in warnings)


# --- with the trackers' packages, which `make test-full` installs -----------------------------------------------------

PACKAGES = ROOT / ".cache" / "trackers"
TOKEN = "0123456789" * 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [PACKAGES / "server" / "bin" / "python", "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    with (folder / "log.txt").open("wb") as log:
        environment = {**program_environment(), "PYTHONPATH": "", "PYTHONSAFEPATH": ""}
        process = subprocess.Popen(
            [*command, "--backend-store-uri", f"sqlite:///{folder}/runs.db"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until(lambda: answers(port), process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def train(request: Request, **environment: str) -> None:
    """Run the program as the orchestrator does, with the trackers' packages behind the runtime's."""
    request.write(request.work / "request.json")
    code = f"import runpy, sys; sys.path.append({str(PACKAGES)!r}); sys.argv = ['tasks', 'request.json']; runpy.run_module('tasks', run_name='__main__')"
    with (request.work / "log.txt").open("ab") as log:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=request.work, env=program_environment() | environment, stdout=log, stderr=log
        )
    assert done.returncode == 0, (request.work / "log.txt").read_text()


def warnings(request: Request) -> list[str]:
    lines = (request.work / "events.jsonl").read_text().splitlines()
    return [event["message"] for event in map(json.loads, lines) if event["type"] == "warning"]


def asked(server: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(f"{server}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.full
def test_a_killed_training_continues_its_run_in_mlflow_and_wandb_keeps_its_run_offline(
    tmp_path: Path, base: Input, mlflow_server: str
) -> None:
    fields = track(mlflow={"tracking_uri": mlflow_server, "experiment": "e", "tags": {"who": "me"}}, wandb={"offline": True, "tags": ["a"]})
    request = request_for(tmp_path / "one", base, **FIELDS).model_copy(update=fields)
    work = tmp_path / ".tuneline" / "work" / "key"
    work.mkdir(parents=True)
    request = request.model_copy(update={"work": work})
    train(request, MLFLOW_RUN_ID="of another program")
    (work / "result.json").unlink()
    shutil.rmtree(work / "checkpoints" / "checkpoint-6")  # as after a kill before it was complete
    train(request.model_copy(update={"name": "demo/sft/another-run"}))
    experiment = tracked(work).links["mlflow"].split("/")[-3]
    (run,) = asked(mlflow_server, "runs/search", {"experiment_ids": [experiment]})["runs"]
    assert (run["info"]["run_name"], run["info"]["status"]) == (NAME, "FINISHED")
    assert {"key": "who", "value": "me"} in run["data"]["tags"]
    assert tracked(work).links["mlflow"] == f"{mlflow_server}/#/experiments/{experiment}/runs/{run['info']['run_id']}"
    history = asked(mlflow_server, f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=loss")["metrics"]
    assert {point["step"] for point in history} == {1, 2, 3, 4, 5, 6}
    assert len({(point["step"], point["value"]) for point in history}) == 6
    kept = list((tmp_path / ".tuneline" / "wandb").glob("offline-run-*"))
    assert len(kept) == 2
    assert all(list(folder.glob("run-demo-sft-*.wandb")) for folder in kept)
    assert warnings(request) == []


@pytest.mark.slow
@pytest.mark.full
def test_trackers_that_hang_or_refuse_delay_only_the_end(tmp_path: Path, base: Input) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # accepts connections, and answers none
        address = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        curves = tmp_path / "file"
        curves.touch()
        fields = track(mlflow={"tracking_uri": address}, wandb={}, tensorboard={"log_dir": str(curves)})
        request = request_for(tmp_path / "hang", base, **FIELDS).model_copy(update=fields)
        train(request, WANDB_BASE_URL=address, WANDB_API_KEY=TOKEN)
    found = sorted(warnings(request))
    assert [message.partition(":")[0] for message in found] == ["mlflow", "tensorboard", "wandb"]
    assert "did not take the rest of the curve within 20 s" in found[0]
    assert "NotADirectoryError" in found[1]
    refusing = f"http://127.0.0.1:{free_port()}"
    request = request_for(tmp_path / "refuse", base, **FIELDS).model_copy(update=track(mlflow={"tracking_uri": refusing}, wandb={}))
    train(request, WANDB_API_KEY="")
    found = sorted(warnings(request))
    assert [message.partition(":")[0] for message in found] == ["mlflow", "wandb"]
    assert "Connection refused" in found[0]
    assert "API key" in found[1]
