"""`down` and the keeper when something comes in between. The processes are stand-ins with the environment of those of `up`; no server runs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from processes import PATIENCE, until

from flows.server import keeper, server_state, up

RUN = "trap 'touch ended; exit' TERM; touch works; while sleep 0.05; do :; done"
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a process of the `up` of `tmp_path`."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(role: str, *command: str, flow_run: str | None = None) -> subprocess.Popen[bytes]:
        environment = {**os.environ, server_state.UP: str(tmp_path), server_state.ROLE: role}
        environment |= {server_state.FLOW_RUN: flow_run} if flow_run else {}
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def state_with(worker: subprocess.Popen[bytes]) -> server_state.State:
    it = server_state.process(worker.pid)
    return server_state.State(address="http://127.0.0.1:9/api", database=None, server=it, workers={"here": it})


def test_ctrl_c_in_down_leaves_no_worker_stopped(tmp_path: Path, started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(done: Callable[[], bool], seconds: float) -> bool:
        raise KeyboardInterrupt

    worker = started("worker here", "sleep", "1000")
    monkeypatch.setattr(up, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        up.end_all(tmp_path, state_with(worker), moved=False)
    assert worker.wait(PATIENCE) == -signal.SIGTERM  # a stopped process would never get it


def test_a_run_that_a_worker_took_at_the_last_moment_ends_in_order(tmp_path: Path, started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, send = started("worker here", "sleep", "1000"), up._signal

    def signal_after_a_run_began(pids: Iterable[int], number: signal.Signals) -> None:
        if number == signal.SIGSTOP:
            started("worker here", "bash", "-c", RUN, flow_run="the-run")
            until(lambda: (tmp_path / "works").exists())
        send(pids, number)

    monkeypatch.setattr(up, "_signal", signal_after_a_run_began)
    ended = up.end_all(tmp_path, state_with(worker), moved=False)
    assert (tmp_path / "ended").exists()
    assert {entry.flow_run for entry in ended if entry.role == "run"} == {"the-run"}


def test_a_full_disk_does_not_end_the_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it writes itself, nor its own log: /dev/full refuses every byte."""
    looks: list[str] = []

    class OnAFullDisk:
        def __init__(self, runs: object): ...

        def look(self, address: str, say: Callable[[str], object]) -> None:
            looks.append(address)
            if len(looks) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")

    it = server_state.process(os.getpid())
    state = server_state.State(address="http://127.0.0.1:9/api", database=None, server=it, keeper=it)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(server_state.UP, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["keeper", str(tmp_path / "pipelines.yaml")])
    monkeypatch.setattr(keeper, "Unreported", OnAFullDisk)
    monkeypatch.setattr(keeper, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "_its_state", lambda folder: state if len(looks) < 2 else None)
    log = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115  (closing it fails)
    monkeypatch.setattr(sys, "stdout", log)
    keeper.main()
    assert len(looks) == 2
    with suppress(OSError):
        log.close()
