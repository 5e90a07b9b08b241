"""The supervisor and its watchdog: whichever process ends or is killed, no process is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE, gone, marked

from flows.run.supervisor import WATCHDOG, WORK, Outcome, Program, Supervisor, program_environment
from flows.server.connect import listens
from tuneline.workspace.protocol import Event, Events

# Marks our processes in /proc, so that a test looks only at its own.
TREE = 'sleep 1000 & (setsid sleep 1000 &) ; trap "" TERM; echo up; while true; do sleep 1; done'


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return tmp_path.name + str(os.getpid())


def run(
    folder: Path,
    mark: str,
    script: str,
    supervisor: Supervisor | None = None,
    timeout: float | None = None,
    once_up: Callable[[], None] = lambda: None,
) -> tuple[Outcome, list[str], list[Event]]:
    """Run a script under the supervisor. Calls `once_up` in a thread once the script is up."""
    lines: list[str] = []
    events: list[Event] = []

    def heard(line: str) -> None:
        lines.append(line)
        if line == "up":
            threading.Thread(target=once_up).start()

    environment = {**os.environ, "MARK": mark, "TUNELINE_GRACE": "0.5"}
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        program = Program(["bash", "-c", script], environment, folder, timeout, (held,))
        outcome = (supervisor or Supervisor()).run(program, heard, events.append)
    finally:
        os.close(held)
    return outcome, lines, events


def test_output_and_status_come_back_and_stragglers_go(tmp_path: Path, mark: str) -> None:
    outcome, lines, _ = run(tmp_path, mark, "echo one; printf 'a\\rb\\n' >&2; (setsid sleep 1000 &); exit 7")
    assert (outcome.status, outcome.stopped) == (7, None)
    assert lines == ["one", "b"]
    assert (tmp_path / "log.txt").read_bytes() == b"one\na\rb\n"
    assert gone(mark)


def test_no_variable_changes_how_a_program_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "FSDP_VERSION", "NVIDIA_TF32_OVERRIDE", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_TOKEN", "t")
    environment = program_environment(tmp_path, [])
    assert environment["HF_TOKEN"] == "t"
    assert not [name for name in environment if name.startswith(("ACCELERATE", "FSDP", "NVIDIA_TF32", "PREFECT"))]


def test_whose_port_it_is_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listens(os.getpid(), port)
        child = subprocess.Popen(["sleep", "100"])
        try:
            assert not listens(child.pid, port)
        finally:
            child.kill()
            child.wait()
    assert not listens(os.getpid(), port)


def test_a_signal_is_passed_on_as_a_status(tmp_path: Path, mark: str) -> None:
    assert run(tmp_path, mark, "kill -SEGV $$")[0].status == 128 + signal.SIGSEGV


def test_events_arrive_whole_and_damaged_lines_are_passed_over(tmp_path: Path, mark: str) -> None:
    Events(tmp_path / "events.jsonl").progress(1, 10)  # of an earlier attempt
    line = '{"t": 1, "type": "progress", "step": %s, "total": 10}\\n'
    script = f"printf '{line % 2}' >> events.jsonl; sleep 0.5; printf 'junk\\n{line % 3}{{\"t\": 2' >> events.jsonl"
    _, _, events = run(tmp_path, mark, script)
    assert [event.step for event in events] == [2, 3]


def test_a_timeout_ends_a_tree_that_ignores_sigterm(tmp_path: Path, mark: str) -> None:
    outcome, _, _ = run(tmp_path, mark, TREE, timeout=0.5)
    assert outcome.stopped == "timeout"
    assert gone(mark)


def test_stop_from_another_thread_ends_everything_and_nothing_starts_after(tmp_path: Path, mark: str) -> None:
    supervisor = Supervisor()
    assert run(tmp_path, mark, TREE, supervisor, once_up=supervisor.stop)[0].stopped == "cancelled"
    assert gone(mark)
    assert run(tmp_path, mark, "touch never", supervisor)[0].stopped == "cancelled"
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_flow_ends_the_tree_and_frees_the_lock_last(tmp_path: Path, mark: str, number: signal.Signals) -> None:
    tree = TREE.replace('trap ""', "trap 'while [ ! -e go ]; do sleep 0.1; done; exit'")
    flow = f"""
import os, sys
sys.path.insert(0, {str(WATCHDOG.parent.parent)!r})
from flows.run.supervisor import Program, Supervisor
from tuneline.workspace.store import Store
from pathlib import Path
with Store(Path({str(tmp_path)!r})).locked("key") as held:
    Supervisor().run(Program(["bash", "-c", {tree!r}], os.environ, Path({str(tmp_path)!r}), locks=(held,)), print, print)
"""
    environment = {**os.environ, "MARK": mark, "TUNELINE_GRACE": "3600"}
    process = subprocess.Popen([sys.executable, "-u", "-c", flow], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "up\n"
        process.send_signal(number)
        process.wait()
    with subprocess.Popen(["flock", "--nonblock", str(tmp_path / ".locks" / "key"), "true"]) as taken:
        assert taken.wait() == 1  # the program may still be writing
    (tmp_path / "go").touch()
    assert gone(mark)
    assert subprocess.run(["flock", "--timeout", "60", str(tmp_path / ".locks" / "key"), "true"]).returncode == 0


def test_the_death_of_the_watchdog_is_noticed(tmp_path: Path, mark: str) -> None:
    def kill() -> None:
        watchdog = next(pid for pid in marked(mark) if b"watchdog.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(watchdog, signal.SIGKILL)

    outcome, _, _ = run(tmp_path, mark, TREE, once_up=kill)
    assert outcome.status == -signal.SIGKILL
    assert not marked(mark)  # the program ends with it, and so do its children


def test_what_an_earlier_attempt_left_is_ended_before_the_next_starts(tmp_path: Path, mark: str) -> None:
    environment = {**os.environ, "MARK": mark, WORK: str(tmp_path)}
    stray = subprocess.Popen(["sleep", "1000"], env=environment)
    other = subprocess.Popen(["sleep", "1000"], env={**environment, WORK: f"{tmp_path}-other"})
    try:
        assert run(tmp_path, mark, "exit 0")[0].status == 0
        assert stray.wait(PATIENCE) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_stop_in_a_hurry_leaves_no_time_to_a_tree_that_ignores_sigterm(tmp_path: Path, mark: str) -> None:
    command = [sys.executable, "-I", "-S", str(WATCHDOG), "bash", "-c", TREE.replace('trap ""', "trap 'echo asked'")]
    environment = {**os.environ, "MARK": mark, "TUNELINE_GRACE": "3600"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.stdin.write(b"e")
        process.stdin.flush()
        assert process.stdout.readline() == b"asked\n"
        process.stdin.close()
        assert process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert gone(mark)
