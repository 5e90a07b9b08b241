"""Starts a stage's processes on this machine, and reports which one failed and why: `python -m tasks.launch WORK/request.json [NODE]`.

torchrun's own agent starts the processes, and ends all of them when one fails. Machines meet at the address that the first one writes
to WORK/rendezvous.json, which must be on a shared disk, like the store. If a process dies, its peers fail as well: only the first
failure is reported. Left out: elastic restarts, since the orchestrator retries.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.files import open_lock, try_lock, write_atomically
from tuneline.kinds.stage import Resources
from tuneline.workspace.file_names import EVENTS, FAILURE, LOG, RENDEZVOUS
from tuneline.workspace.protocol import Events, Failure, Request

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

RANKS = "ranks"  # folder of the attempt's processes: logs of all but the first, and their failures
FAILURE_SUFFIX = ".failure.json"
HEARTBEAT_SUFFIX = ".here"  # file of a machine that still answers after a failure
LOST_PEER = "another process of the stage ended or hangs: the stage is tried again"
SECONDS_OF_OTHERS = 5.0  # until an event on one machine is visible on another
HUNG = 15  # seconds after another process's failure; torchrun waits 30 for a process that ignores SIGTERM
LOG_TAIL = 30  # lines
JOIN_SECONDS = 600  # that machines wait for one another


def main() -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    request_file, node = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    request, work = Request.read(request_file), request_file.parent
    resources = Resources.model_validate(request.resources)
    ranks = work / RANKS
    if node == 0:
        shutil.rmtree(ranks, ignore_errors=True)
        ranks.mkdir()
    if "TORCH_EXTENSIONS_DIR" not in os.environ and os.access(sys.prefix, os.W_OK):
        own_extensions(Path(sys.prefix, "torch_extensions"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // resources.local_processes)))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # failures are reported here
    wait = min(JOIN_SECONDS, resources.collective_timeout)
    if resources.nodes == 1:
        meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": request.key[:16]}
    else:
        where = announced(request, resources.nodes) if node == 0 else json.loads((work / RENDEZVOUS).read_bytes())
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": where["endpoint"], "run_id": where["id"]}
        meeting["rdzv_configs"] = {"rank": node, "timeout": wait}
    config = LaunchConfig(
        min_nodes=resources.nodes,
        max_nodes=resources.nodes,
        nproc_per_node=resources.local_processes,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=max(1, int(float(os.environ.get("TUNELINE_GRACE", "3")))),
        **meeting,
    )
    ended = threading.Event()
    if resources.nodes > 1:
        threading.Thread(target=end_with_the_others, args=(ranks, node, ended), daemon=True).start()
    try:
        try:
            launch_agent(config, sys.executable, ["-u", "-m", "tasks", str(request_file)])
            return 0
        finally:
            ended.set()
    except ChildFailedError as error:
        status = note_deaths(error.failures, ranks, work / LOG)
        failure = first_said(ranks, patience=SECONDS_OF_OTHERS if resources.nodes > 1 else 0)
    except SignalException as error:
        failure, status = first_said(ranks), 128 + error.sigval
    except Exception as error:
        if type(error).__name__ not in ("DistStoreError", "DistNetworkError", "RendezvousTimeoutError", "RendezvousConnectionError"):
            raise
        message = f"not all of {resources.nodes} machines met within {wait} s: {str(error).splitlines()[0]}"
        failure, status = transient(message, f"run {joining(request, resources.nodes)} there, with this store"), 1
    finally:
        if node == 0:
            (work / RENDEZVOUS).unlink(missing_ok=True)
    if failure and failure.hint == LOST_PEER and (silent := absent(ranks, resources.nodes, node)):
        failure = machine_lost(request, silent, failure)
    if failure is not None:
        print(failure.details or failure.message, file=sys.stderr, flush=True)
        failure.write((work if node == 0 else Path.cwd()) / FAILURE)
    return status


def own_extensions(folder: Path) -> None:
    """Make DeepSpeed compile its operators into the runtime: in torch's default, the home folder, runtimes would overwrite each other's.

    torch's build lock stays behind if a build is killed, and later builds would wait forever. It is removed if no process builds.
    """
    folder.mkdir(exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    in_use = open_lock(folder / "in-use")  # held until this process ends
    if try_lock(in_use):
        for left in folder.glob("*/lock"):
            left.unlink()
    fcntl.flock(in_use, fcntl.LOCK_SH)


def announced(request: Request, nodes: int) -> dict[str, str]:
    """Publish, to the other machines and to users, the address where this machine waits.

    TUNELINE_NODE_ADDRESS overrides the host name, for machines that have another name outside.
    """
    address = os.environ.get("TUNELINE_NODE_ADDRESS") or socket.getfqdn()
    with socket.socket() as probe:
        probe.bind(("", 0))
        where = {"endpoint": f"{address}:{probe.getsockname()[1]}", "id": f"{request.key[:16]}-{request.attempt}-{time.time_ns()}"}
    write_atomically(request.work / RENDEZVOUS, json.dumps(where))
    message = f"waits at {where['endpoint']} for {nodes - 1} more: run {joining(request, nodes)} there"
    Events(request.work / EVENTS).progress(0, 1, message)
    return where


def joining(request: Request, nodes: int) -> str:
    """Return the command to run on the other machines."""
    return f"`{request.join} --rank 1`" + (f" to {nodes - 1}" if nodes > 2 else "")


def end_with_the_others(ranks: Path, node: int, ended: threading.Event) -> None:
    """Stop this machine's processes after a failure on any machine: waiting for a dead peer may take long (NCCL). Also marks this
    machine as alive. `ended` is set when this machine's processes have ended."""
    while not list(ranks.glob(f"*{FAILURE_SUFFIX}")):
        time.sleep(1)
    (ranks / f"{node}{HEARTBEAT_SUFFIX}").touch()
    if not ended.wait(SECONDS_OF_OTHERS):  # they may fail themselves, and report it
        os.kill(os.getpid(), signal.SIGTERM)


def note_deaths(failures: dict[int, ProcessFailure], ranks: Path, log: Path) -> int:
    """Write the failure of each process that could not write its own. Returns the exit status, which reflects a killed process."""
    status, failed_at = 1, [file.stat().st_mtime for file in ranks.glob(f"*{FAILURE_SUFFIX}")]
    for rank, failed in failures.items():
        if failed_at and failed.exitcode == -signal.SIGKILL and time.time() - min(failed_at) > HUNG:
            continue  # it hung, and torchrun ended it
        if (ranks / f"{rank}{FAILURE_SUFFIX}").exists() or failed.exitcode == -signal.SIGTERM:  # the agent sends SIGTERM to the others
            continue
        tail = end_of(log if rank == 0 else ranks / f"{rank}.log")
        if failed.exitcode < 0:
            status = 128 - failed.exitcode
            death = transient(f"was ended by {signal.Signals(-failed.exitcode).name}", "the stage is tried again", tail)
        else:
            message = f"ended with status {failed.exitcode} without saying why; the end of its log:\n{tail}"
            death = transient(message, "the stage is tried again", tail)
        death.write(ranks / f"{rank}{FAILURE_SUFFIX}")
    return status


def first_said(ranks: Path, patience: float = 0) -> Failure | None:
    """Return the failure of the first process that failed. A lost peer is no cause if another failure is known, or may arrive within
    `patience` seconds from another machine."""
    deadline = time.monotonic() + patience
    while True:
        files = sorted(ranks.glob(f"*{FAILURE_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
        said: list[tuple[Path, Failure]] = [(file, Failure.read(file)) for file in files]
        said.sort(key=lambda entry: entry[1].hint == LOST_PEER)
        if (said and said[0][1].hint != LOST_PEER) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if not said:
        return None
    file, failure = said[0]
    of = f"process {file.name.removesuffix(FAILURE_SUFFIX)}"
    message = f"{of} {failure.message}" if failure.message.startswith(("was ended", "ended with")) else f"{of}: {failure.message}"
    return failure.model_copy(update={"message": message})


def absent(ranks: Path, nodes: int, node: int) -> list[int]:
    """Return the machines that have not answered a failure."""
    return [other for other in range(nodes) if other != node and not (ranks / f"{other}{HEARTBEAT_SUFFIX}").exists()]


def machine_lost(request: Request, silent: list[int], failure: Failure) -> Failure:
    """Return a clearer failure than torch's messages about a lost machine."""
    machines = f"machine{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
    message = f"{machines} of {request.resources['nodes']} went away or {'do' if len(silent) > 1 else 'does'} not answer"
    return transient(message, f"the stage is tried again, there by `{request.join} --rank {silent[-1]}`", failure.details)


def transient(message: str, hint: str, details: str = "") -> Failure:
    return Failure.model_validate({"class": "transient", "message": message, "hint": hint, "details": details})


def end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:]) if log.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
