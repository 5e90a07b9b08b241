"""The workers of `tuneline up`: one for each pool of this machine, each in its own session."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from flows.machine import gpus_asked, visible_gpus
from flows.server import server_state
from flows.server.connect import DATABASE, QUIET, tail
from flows.server.worker import heartbeat, worker_command
from tuneline.config.load import Loaded
from tuneline.config.pools import ProcessPool
from tuneline.errors import StageFailed

START_SECONDS = 120  # in which a worker must send its first heartbeat; takes 5 s on two idle cores
END_SECONDS = 10.0
POLL_SECONDS = "2"  # between a worker's polls for runs; Prefect's default of 10 s delays every run


def missing(loaded: Loaded, state: server_state.State) -> list[str]:
    """Return the pools of this machine whose worker is not running."""
    local = [name for name, pool in loaded.spec.pools.items() if isinstance(pool, ProcessPool) and pool.local]
    return [name for name in local if name not in state.workers or not state.workers[name].alive]


def start(loaded: Loaded, folder: Path, state: server_state.State, say: Callable[[str], object]) -> list[str]:
    """Start the missing workers and save each in the state. Returns their pools. Raises StageFailed if one does not start."""
    started = []
    for name in missing(loaded, state):
        say(f"starting a worker for the pool {name}{_without_gpus(loaded, name)}")
        state.workers[name] = _start(folder, state.address, name)
        server_state.write(folder, state)
        started.append(name)
    return started


def start_beside(loaded: Loaded, address: str, say: Callable[[str], object]) -> None:
    """Start the missing workers if the server at `address` is that of this project's `up`."""
    folder = server_state.folder_of(loaded.root)
    state = server_state.read(folder)
    if state and state.address == address.rstrip("/") and missing(loaded, state):
        with server_state.alone(folder):
            if state := server_state.read(folder):
                start(loaded, folder, state, say)


def _without_gpus(loaded: Loaded, pool: str) -> str:
    """Return a warning if a stage of the pool requests more GPUs than this machine has."""
    there = len(visible_gpus())
    found = next(((stage, gpus) for stage, gpus, its in gpus_asked(loaded) if its == pool and gpus > there), None)
    return (
        f" (warning: {found[0]} asks for {found[1]} GPU{'s' if found[1] > 1 else ''}, this machine shows {there}: see `tuneline doctor`)"
        if found
        else ""
    )


def _start(folder: Path, address: str, pool: str) -> server_state.Process:
    log, deadline = folder / f"worker-{pool}.log", time.monotonic() + START_SECONDS
    before, settings = heartbeat(address, pool), {"PREFECT_WORKER_QUERY_SECONDS": POLL_SECONDS}
    process = spawn(worker_command(pool, "process"), folder, f"worker {pool}", address, log, settings)
    try:
        while heartbeat(address, pool) in (None, before):
            if process.poll() is not None or time.monotonic() > deadline:
                message = f"the worker of the pool {pool} did not start; the end of {log}:\n{tail(log)}"
                raise StageFailed("bug", message, "`tuneline up` retries")
            time.sleep(0.2)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return server_state.process(process.pid)


def end(worker: server_state.Process) -> None:
    """End the worker of a pool that left the file: it would create the pool again. Its runs end with it, and can resume elsewhere."""
    if worker.alive:
        os.kill(worker.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while worker.alive and time.monotonic() < deadline:
            time.sleep(0.1)


def spawn(command: list[str], folder: Path, role: str, address: str, log: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process of `up`. Removes the database address from its environment: it may hold a password, and only the server needs it."""
    inherited = {name: value for name, value in os.environ.items() if name not in DATABASE}
    ours = {
        server_state.UP: str(folder),
        server_state.ROLE: role,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": address,
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **QUIET, **ours, **settings},
            start_new_session=True,
        )
