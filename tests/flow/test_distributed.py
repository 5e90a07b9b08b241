"""Trainings in several processes and on several machines by the real commands: a killed process is retried and resumes, running
out of memory halves the micro-batch, machines find each other with the templates of infra/."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from pico_project import copied, make
from processes import PATIENCE, gone, marked, until
from project import ROOT, Project
from small_disk import small_disk

from tuneline.config.load import load
from tuneline.workspace.protocol import Request
from tuneline.workspace.workspace import Workspace

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]
PIPELINES = """\
version: 1
roots: ["%(models)s"]
runtimes: {here: {python: "%(python)s"}}
pipelines:
  pico:
    stages:
      base:  {kind: model, path: %(model)s, runtime: here}
      words: {kind: dataset, model: base, sources: [{type: files, path: words.jsonl}], runtime: here}
      sft:   {kind: sft, model: base, dataset: words, lora: {r: 8}, learning_rate: 5e-3, max_steps: 40, global_batch_size: 8, runtime: here,
              resources: {checkpoint_steps: 5, processes: 2}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, program_python: Path, pico_model: Path, prefect_server: str) -> Project:
    """A project whose DDP training has run undisturbed: the reference curve. Its base and dataset are in the store."""
    project = make(tmp_path_factory.mktemp("ran") / "project", program_python, pico_model, PIPELINES)
    project.tuneline("run", "pico")
    return project


@pytest.fixture(scope="module")
def expected(ran: Project) -> list[float]:
    return curve(ran)


@pytest.fixture
def pico(ran: Project, tmp_path: Path) -> Project:
    """The project with its store, but without the training."""
    project = copied(ran, tmp_path / "project")
    for artifact in project.root.glob(".tuneline/store/sft/*/*"):
        shutil.rmtree(artifact)
    return project


def rank(project: Project, number: int) -> int | None:
    """The process of one rank of the training."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", name, "cmdline").read_bytes().decode().split("\0")
            environment = Path("/proc", name, "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "tasks" in command and "-I" not in command and str(project.root) in " ".join(command) and f"RANK={number}" in environment:
            return int(name)
    return None


def curve(project: Project) -> list[float]:
    artifact = project.json("plan", "pico")["stages"][2]["artifact"]
    entries = map(json.loads, Path(artifact, "meta", "history.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_what_kills_one_process_costs_one_attempt(pico: Project, expected: list[float]) -> None:
    """With ZeRO-2: the stage resumes, and ends like the undisturbed DDP training."""
    mark = f"distributed-{os.getpid()}"
    process = pico.start("run", "pico", "--verbose", "--set", "sft.resources.strategy=zero2", MARK=mark)
    until(lambda: list(pico.root.glob(".tuneline/work/*/checkpoints/checkpoint-*/complete")), process)
    os.kill(until(lambda: rank(pico, 1), process), signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "transient: process 1 was ended by SIGKILL (the stage is tried again)" in err
    assert err.count("resuming from checkpoint-") == 1
    assert re.search(r"sft: started \(sft, attempt 2, resumes from step \d+\)", err)
    assert "zero2 trains, over 2 processes" in err
    assert gone(mark)
    assert curve(pico) == pytest.approx(expected, rel=1e-4)
    assert pico.tuneline("verify").stderr == "3 artifacts, 0 damaged\n"


INJECTED = """\
import runpy, sys
import torch
from tasks.training import sft_trainer

real = sft_trainer.TokenWeightedTrainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    if self.state.global_step >= 7 and len(inputs["input_ids"]) > 2 and self.model.training:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return real(self, model, inputs, *args, **kwargs)

sft_trainer.TokenWeightedTrainer.compute_loss = compute_loss
from tasks.__main__ import main
sys.exit(main())
"""


@pytest.mark.full
def test_an_out_of_memory_halves_the_micro_batch_once(pico: Project, runtime_python: Path, program_python: Path) -> None:
    """From the last checkpoint, with the same global batch, and the report says so."""
    one = ("--set", "sft.resources.processes=1")
    pico.tuneline("run", "pico", *one)
    expected = curve(pico)
    pico.write(INJECTED, "inject.py")
    shell = (
        f'#!/bin/sh\nif [ "$2" = tasks ]; then shift 2; exec {runtime_python} {pico.root}/inject.py "$@"; fi\nexec {runtime_python} "$@"\n'
    )
    pico.write(shell, "python").chmod(0o755)
    text = (pico.root / "pipelines.yaml").read_text().replace(f'python: "{program_python}"', "python: python")
    pico.write(text)
    done = pico.tuneline("run", "pico", "--verbose", "--force", "sft", *one, "--set", "sft.resources.micro_batch_size=4")
    assert done.stderr.count("oom: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (retried with micro_batch_size 2)") == 1
    assert "sft: started (sft, attempt 2, resumes from step 5)" in done.stderr
    assert "resuming from checkpoint-5" in done.stderr
    assert curve(pico) == pytest.approx(expected, rel=1e-3)
    manifest = pico.json("show", "pico/sft")
    assert (manifest["host"]["attempts"], manifest["host"]["micro_batch_size"]) == (2, 2)
    report = next(pico.root.glob(f".tuneline/runs/{pico.json('show', 'pico')['run_id']}.html")).read_text()
    assert "attempts: 2, failed before: oom; ended with micro-batches of 2" in report


@pytest.mark.full
def test_a_disk_that_is_full_ends_all_processes_and_once_there_is_room_it_goes_on(pico: Project) -> None:
    """There is space for one checkpoint and for log lines, but not for a second checkpoint, of which each process writes a part."""
    zero = ("--set", "sft.resources.strategy=zero2")
    mark = f"full-{os.getpid()}"
    with small_disk(pico.root / ".tuneline" / "work", "64m") as disk:
        process = pico.start("run", "pico", *zero, MARK=mark)
        until(lambda: list(disk.glob("*/checkpoints/checkpoint-5/complete")), process)
        filler = disk / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - 300_000)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1, err
        room = r"is full: the program had written .* there and needs more space; without them .* are free\n"
        assert re.search(rf"sft: failed\n    disk: the disk of {disk}/\w+ {room}", err), err
        assert "tried again" not in err
        assert "Traceback" not in err
        assert gone(mark)
        assert list(pico.root.glob(".tuneline/store/.building/*")) == list(pico.root.glob(".tuneline/store/sft/*/*")) == []
        filler.unlink()
        assert "sft: started (sft, resumes from step 5)" in pico.tuneline("run", "pico", *zero).stderr
    assert pico.tuneline("verify").stderr == "3 artifacts, 0 damaged\n"


def test_other_resources_go_on_or_are_refused_before_anything_starts(pico: Project) -> None:
    """Plan and run agree: a training resumes from ZeRO-2 on two processes to ZeRO-1 on one, but not to DDP."""
    process = pico.start("run", "pico", "--set", "sft.resources.strategy=zero2", "--set", "sft.retries=0")
    (marker,) = until(lambda: list(pico.root.glob(".tuneline/work/*/checkpoints/checkpoint-5/complete")), process)
    os.kill(until(lambda: rank(pico, 1), process), signal.SIGKILL)
    process.communicate(timeout=PATIENCE)

    message = (
        "checkpoint-5 was written with the strategy zero2 over 2 processes, which ddp cannot read\n\n"
        "hint: resume with zero1 or zero2, over any number of processes, or `--force` the stage to start from scratch\n"
    )
    assert message in pico.tuneline("plan", "pico").stderr
    refused = pico.tuneline("run", "pico", status=1)
    assert "sft: failed\n    config: checkpoint-5 was written with" in refused.stderr
    assert "sft: started" not in refused.stderr
    assert marker.exists()

    other = ("--set", "sft.resources.strategy=zero1", "--set", "sft.resources.processes=1")
    plan = pico.tuneline("plan", "pico", *other)
    assert message not in plan.stderr
    assert "resumes from step 5" in plan.stdout
    assert pico.json("plan", "pico", *other)["stages"][2]["resumes_from_step"] == 5
    done = pico.tuneline("run", "pico", "--verbose", *other)
    assert "sft: started (sft, resumes from step 5)" in done.stderr
    assert "checkpoint-5 has the layout zero2 over 2 processes: it is converted to zero1 over 1 process" in done.stderr


SRUN = """\
#!/bin/bash
# Stands for Slurm's: each task on a machine of its own, here all on this one.
shift
SLURM_PROCID=1 "$@" > node.log 2>&1 &
SLURM_PROCID=0 "$@"; status=$?
wait; exit $status
"""


def test_two_machines_train_one_adapter_by_the_template_for_slurm(pico: Project, expected: list[float]) -> None:
    """A process on the second machine is killed: both end, and join again."""
    text = (pico.root / "pipelines.yaml").read_text()
    pico.write(text.replace("processes: 2", "processes: 1, nodes: 2").replace("max_steps: 40", "max_steps: 39"))
    pico.write(SRUN, "bin/srun").chmod(0o755)
    pico.write(f'#!/bin/sh\nexec {sys.executable} -m flows "$@"\n', "bin/tuneline").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{pico.root}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TUNELINE_NODE_ADDRESS": "127.0.0.1",
    }
    command = ["bash", str(ROOT / "infra" / "slurm" / "train.sbatch"), "pico"]
    process = subprocess.Popen(command, cwd=pico.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: list(pico.root.glob(".tuneline/work/*/checkpoints/checkpoint-*/complete")), process)
    os.kill(until(lambda: rank(pico, 1), process), signal.SIGKILL)
    _out, err = process.communicate(timeout=PATIENCE)
    node = (pico.root / "node.log").read_text()
    assert process.returncode == 0, f"{err}\n{node}"
    assert "transient: process 1 was ended by SIGKILL" in err
    assert node.count("joins sft") == 2
    assert "pico completed" in node
    assert curve(pico) == pytest.approx(expected[:39], rel=1e-2)  # another schedule of the learning rate


@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_goes_away_is_named(pico: Project, machine: int) -> None:
    """The log has the errors of its peers; terminals show no traceback."""
    text = (pico.root / "pipelines.yaml").read_text()
    pico.write(text.replace("processes: 2", "processes: 1, nodes: 2").replace("kind: sft,", "kind: sft, retries: 0,"))
    mark = f"machine-{os.getpid()}"
    marks = [mark if number == machine else "" for number in (0, 1)]
    run = pico.start("run", "pico", MARK=marks[0], TUNELINE_NODE_ADDRESS="127.0.0.1")
    node = pico.start("node", "pico", "--rank", "1", MARK=marks[1])
    until(lambda: list(pico.root.glob(".tuneline/work/*/checkpoints/checkpoint-*/complete")), run)
    lost = marked(mark)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once
        for pid in lost:
            with suppress(ProcessLookupError):  # some live for a moment only
                os.kill(pid, number)
    (_, err), (_, said) = run.communicate(timeout=PATIENCE), node.communicate(timeout=PATIENCE)
    assert "Traceback" not in err + said
    assert "gloo" not in err + said
    if machine == 0:
        assert "ended here, transient: machine 0 of 2 went away or does not answer; its log is " in said
        assert node.returncode == 1
    else:
        again = f"the stage is tried again, there by `tuneline node pico --file {pico.root}/pipelines.yaml --rank 1`"
        assert f"sft: failed\n    transient: machine 1 of 2 went away or does not answer\n    \n    hint: {again}\n" in err
        assert run.returncode == 1
        (log,) = pico.root.glob(".tuneline/work/*/log.txt")
        assert "Traceback" in log.read_text()


def test_a_machine_that_does_not_come_ends_the_stage(pico: Project) -> None:
    text = (pico.root / "pipelines.yaml").read_text()
    pico.write(
        text.replace("processes: 2", "processes: 1, nodes: 2, collective_timeout: 4").replace("kind: sft,", "kind: sft, retries: 0,")
    )
    done = pico.tuneline("run", "pico", "--set", "sft.seed=7", status=1, TUNELINE_NODE_ADDRESS="127.0.0.1")
    assert "waits at 127.0.0.1:" in done.stderr
    command = f"`tuneline node pico --file {pico.root}/pipelines.yaml --set sft.seed=7 --rank 1`"  # the flags are the run's
    assert f"for 1 more: run {command} there\n" in done.stderr
    assert "transient: not all of 2 machines met within 4 s" in done.stderr
    assert f"run {command} there, with this store" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pico", "--rank", "1"], "--rank: found 1 for pico, expected none: no stage of it has `nodes`\n\nhint: set `resources: {nodes: 2}` in a training\n"),
        (["pico", "--rank", "2", "--set", "sft.resources.nodes=2"], "--rank: found 2 for pico, expected 1\n\nhint: the run itself is machine 0\n"),
    ],
)  # fmt: skip
def test_a_machine_for_which_there_is_no_work_does_not_wait(pico: Project, arguments: list[str], message: str) -> None:
    assert pico.tuneline("node", *arguments, status=2).stderr == message


MACHINES = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pipelines:
  demo:
    stages:
      base: {kind: model, path: base}
      rows: {kind: dataset, sources: [{type: files, path: rows.jsonl}]}
      sft:  {kind: sft, model: base, dataset: rows, runtime: stand-in, resources: {nodes: 2}}
"""


def test_a_number_is_of_one_machine(project: Project, stand_in: Callable[..., None]) -> None:
    project.write(MACHINES)
    first = project.start("node", "demo", "--rank", "1")
    assert first.stderr is not None
    assert first.stderr.readline() == "waiting for a run of demo\n"
    refused = project.tuneline("node", "demo", "--rank", "1", status=2).stderr
    assert refused == (
        f"--rank: found 1, which is process {first.pid} on {socket.gethostname()} already, expected a number that no other machine of demo "
        "has\n\nhint: give each machine its own, or end that one first\n"
    )
    first.kill()
    first.communicate()
    second = project.start("node", "demo", "--rank", "1")
    assert second.stderr is not None
    assert second.stderr.readline() == "waiting for a run of demo\n"
    second.kill()
    second.communicate()


def test_a_machine_has_the_flags_of_its_run(project: Project, stand_in: Callable[..., None]) -> None:
    """As Prefect passes them on: the same value in another spelling is equal."""
    project.write(MACHINES.replace("version: 1", "version: 1\nvars: {rows: rows.jsonl}").replace("path: rows.jsonl", 'path: "${rows}"'))
    file, run_flags = project.root / "pipelines.yaml", ("sft.learning_rate=0.001", 'sft.description="one two"')
    runs = Workspace(load(file)).runs
    record = runs.begin("demo", (*run_flags, '--var rows="a.jsonl"'))
    sets = ("--set", "sft.learning_rate=1.0e-3", "--set", "sft.description=one two")
    refused = project.tuneline("node", "demo", "--rank", "1", *sets, "--set", "sft.seed=4", status=2).stderr
    hint = (
        f"hint: `tuneline node demo --file {file} --set sft.learning_rate=0.001 --set 'sft.description=\"one two\"' "
        "--var 'rows=\"a.jsonl\"' --rank 1`\n"
    )
    assert refused == (
        f'--var rows: found none, expected "a.jsonl", as run {record.run_id} has it\n\n{hint}\n'
        f"--set sft.seed: found 4, expected none, as run {record.run_id} has it\n\n{hint}"
    )
    joined = project.start("node", "demo", "--rank", "1", *sets, "--var", "rows=a.jsonl")
    assert joined.stderr is not None
    assert joined.stderr.readline() == f"machine 1 of run {record.run_id}\n"
    runs.finish(record, "completed")
    joined.communicate(timeout=PATIENCE)
    assert joined.returncode == 0


@pytest.mark.parametrize(
    ("number", "working"),
    [
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        (signal.SIGHUP, True),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.full),
    ],
)
def test_an_interrupted_machine_ends_as_an_interrupted_run_does(
    project: Project, stand_in: Callable[..., None], working: bool, number: signal.Signals
) -> None:
    """`working`: on a stage whose first machine, planted here, waits for it."""
    project.write(MACHINES)
    stand_in(sft=["sleep"])
    workspace = Workspace(load(project.root / "pipelines.yaml"))
    record = workspace.runs.begin("demo", ())
    if working:
        stage = workspace.loaded.pipeline("demo").stages["sft"]
        config, work = stage.model_dump(mode="json"), workspace.work("0" * 64)
        work.mkdir(parents=True)
        Request(
            kind="sft", key="0" * 64, config=config, seed=0, inputs={}, files={}, commits={}, out=project.root / "out", work=work, attempt=1,
            resources=config["resources"],
        ).write(work / "request.json")  # fmt: skip
        (work / "rendezvous.json").write_text(json.dumps({"id": f"meeting-{time.time_ns()}"}))
        earlier = workspace.work("1" * 64)  # left by a killed run: no process waits there
        shutil.copytree(work, earlier)
        (earlier / "rendezvous.json").write_text('{"id": "meeting-1"}')
    process = project.start("node", "demo", "--rank", "1")
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    if working:
        until(lambda: (project.root / "sleeping-sft").exists(), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert lines == [f"machine 1 of run {record.run_id}\n"]
    assert err.splitlines()[-1] == "interrupted; run again to resume"
    assert "Traceback" not in err
    workspace.runs.finish(record, "completed")
