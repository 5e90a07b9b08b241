"""`tuneline node`: run one more machine in the stages of a run that train on several machines (`resources.nodes`).

The machines share the project's folder and its store. For such a stage the first machine's program writes its rendezvous address into
the stage's work folder (`tasks/launch.py`), and this machine joins it with the same request. Nothing else passes between them: the
scheduler allocates the machines (templates for Slurm and Kubernetes are in `infra/`).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flows.folders import work_in
from flows.machine import visible_gpus
from flows.run.slots import Slots
from flows.run.supervisor import Program, Supervisor, program_environment
from tuneline.config.overrides import as_flags, as_overrides
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.files import try_lock
from tuneline.kinds.stage import ProgramStage, Resources
from tuneline.workspace.file_names import FAILURE, LOG, RENDEZVOUS, REQUEST
from tuneline.workspace.protocol import Failure, Request
from tuneline.workspace.runs import RunRecord
from tuneline.workspace.runtimes import find_runtime
from tuneline.workspace.workspace import Workspace

POLL = 0.5  # seconds between polls of the shared folder


@dataclass(frozen=True)
class Machine:
    """This machine, as it takes part in a run."""

    workspace: Workspace
    record: RunRecord
    rank: int
    supervisor: Supervisor
    say: Callable[[str], None]


def check_rank(workspace: Workspace, pipeline: str, rank: int) -> None:
    """Raises ConfigError if no stage of the pipeline has work for that machine, which would wait forever."""
    stages = workspace.loaded.pipeline(pipeline).stages
    most = max((stage.resources.nodes for stage in stages.values() if isinstance(stage, ProgramStage)), default=1)
    if rank >= most:
        allowed = f"1 to {most - 1}" if most > 2 else "1" if most == 2 else "none: no stage of it has `nodes`"
        hint = "set `resources: {nodes: 2}` in a training" if most == 1 else "the run itself is machine 0"
        raise ConfigError([Problem("", f"found {rank} for {pipeline}, expected {allowed}", hint, place="--rank")])


def command(pipeline: str, file: Path, overrides: Sequence[str]) -> str:
    """Return the command that starts another machine, from any folder. `--rank` is to be appended."""
    return shlex.join(["tuneline", "node", pipeline, "--file", str(file), *as_flags(overrides)])


def check_flags(workspace: Workspace, record: RunRecord, rank: int) -> None:
    """Raises ConfigError with every flag that differs from the run's flags."""
    here, there = (as_overrides("", overrides) for overrides in (workspace.loaded.overrides, record.overrides))
    hint = f"`{command(record.pipeline, workspace.loaded.file, record.overrides)} --rank {rank}`"
    problems = []
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = (json.dumps(flags[name]) if name in flags else "none" for flags in (here, there))
        if ours != theirs:
            flag = name if name.startswith("--var ") else f"--set {name}"
            problems.append(Problem("", f"found {ours}, expected {theirs}, as run {record.run_id} has it", hint, place=flag))
    if problems:
        raise ConfigError(problems)


@contextmanager
def only_one(workspace: Workspace, pipeline: str, rank: int) -> Iterator[None]:
    """Hold the rank among the machines of the pipeline. Raises ConfigError if another process holds it."""
    folder = workspace.home / "nodes"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{pipeline}-{rank}.lock").open("a+", encoding="utf-8") as held:
        if not try_lock(held.fileno()):
            held.seek(0)
            found = f"found {rank}, which is {held.read()} already, expected a number that no other machine of {pipeline} has"
            raise ConfigError([Problem("", found, "give each machine its own, or end that one first", place="--rank")])
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}")
        held.flush()
        yield


def serve(workspace: Workspace, pipeline: str, rank: int, say: Callable[[str], None]) -> RunRecord:
    """Join the pipeline's current run, or wait for the next one. Returns its record once it has ended."""
    supervisor = Supervisor()
    for number in (signal.SIGTERM, signal.SIGHUP):  # shut down gracefully, as on Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        record = _next_run(workspace, pipeline, say)
        check_flags(workspace, record, rank)
        say(f"machine {rank} of run {record.run_id}")
        done: set[str] = set()
        while (record := workspace.runs.get(pipeline, record.run_id)).state == "running":
            machine = Machine(workspace, record, rank, supervisor, say)
            for work, meeting in _meetings(work_in(workspace.home), record):
                if meeting not in done:
                    done.add(meeting)
                    _join(machine, work, meeting)
            time.sleep(POLL)
        return record
    finally:
        supervisor.stop()


def _next_run(workspace: Workspace, pipeline: str, say: Callable[[str], None]) -> RunRecord:
    announced = False
    while True:
        try:
            record = workspace.runs.get(pipeline, None)
        except ConfigError:  # none yet
            record = None
        if record is not None and workspace.runs.alive(record):
            return record
        if not announced:
            say(f"waiting for a run of {pipeline}")
        announced = True
        time.sleep(POLL)


def _meetings(folder: Path, record: RunRecord) -> Iterator[tuple[Path, str]]:
    """Yield the work folders whose first machine waits, with the id of that rendezvous, which ends with its time (`tasks/launch.py`).

    Skips those older than the run: another run that was killed left them.
    """
    began = datetime.fromisoformat(record.started).timestamp()
    for file in folder.glob(f"*/{RENDEZVOUS}"):
        try:
            meeting = json.loads(file.read_bytes())["id"]
        except (OSError, ValueError):  # gone since
            continue
        if int(meeting.rpartition("-")[2]) / 1e9 >= began:
            yield file.parent, meeting


def _join(machine: Machine, work: Path, meeting: str) -> None:
    """Take part in one attempt until it ends here, or its first machine has left it."""
    workspace, rank, say = machine.workspace, machine.rank, machine.say
    try:
        request: Request = Request.read(work / REQUEST)
    except FileNotFoundError:
        return
    resources = Resources.model_validate(request.resources)
    if rank >= resources.nodes:
        return
    stage = request.stage()
    runtime = find_runtime(stage.runtime, workspace.loaded.spec, workspace.root)
    if not runtime.ready:
        raise StageFailed(
            "config", f"the runtime {stage.runtime} is not set up on this machine", f"`tuneline setup {stage.runtime}` builds it"
        )
    folder = workspace.home / "nodes" / f"{rank}-{request.key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    arguments = [str(runtime.python), "-m", "tasks.launch", str(work / REQUEST), str(rank)]
    ended = threading.Event()

    def leave_with_the_first() -> None:
        while not ended.wait(POLL):
            if meeting not in (name for _, name in _meetings(work.parent, machine.record)) and not ended.wait(
                10
            ):  # the programs may end on their own
                machine.supervisor.end_all()

    watching = threading.Thread(target=leave_with_the_first, daemon=True)
    with Slots(None, visible_gpus()).taken(resources.gpus, resources.devices, {"stage": request.kind}, say) as taken:
        say(f"joins {request.kind} {request.key[:12]}")
        watching.start()
        try:
            environment = program_environment(folder, taken.gpus)
            outcome = machine.supervisor.run(Program(arguments, environment, folder, locks=taken.descriptors))
        finally:
            ended.set()
            watching.join()
        how = f"status {outcome.status}"
        if (folder / FAILURE).exists():
            failure: Failure = Failure.read(folder / FAILURE)
            how = f"{failure.failure_class}: {failure.message}"
        say(f"{request.kind} {request.key[:12]} ended here, {how}" + (f"; its log is {folder / LOG}" if outcome.status else ""))
