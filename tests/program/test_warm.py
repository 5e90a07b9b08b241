"""The warm parent of the tests: a program that it forks ends as a real one, and ends with the client that stands for it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from process_tools import environment, state, steps
from processes import PATIENCE, until
from sft_tools import request_for
from strategy_tools import failure
from warm import descendants

from tuneline.workspace.protocol import Input, Request

pytestmark = pytest.mark.process  # the client is one


def stopped(request: Request, warm_python: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A client whose program has stopped itself at step 2, and that program."""
    request.write(request.work / "request.json")
    before = set(descendants(os.getpid()))
    with (request.work / "log.txt").open("wb") as log:
        command = [warm_python, "-m", "tasks", str(request.work / "request.json")]
        client = subprocess.Popen(command, cwd=request.work, env=environment(stop_at=2), stdout=log, stderr=log)

    def found() -> list[int]:
        assert client.poll() is None, (request.work / "log.txt").read_text()
        return [pid for pid in descendants(os.getpid()) if pid not in before and state(pid) == "T"]

    (program,) = until(found)
    assert steps(request)[-1] == 2
    return client, program


def test_a_signal_to_the_client_is_the_programs(tmp_path: Path, base: Input, warm_python: Path) -> None:
    request = request_for(tmp_path, base)
    client, program = stopped(request, warm_python)
    client.terminate()
    until(lambda: pending(program))
    os.kill(program, signal.SIGCONT)
    assert client.wait(PATIENCE) == 1
    assert "stopped by SIGTERM: a checkpoint of step " in failure(request).message


def pending(pid: int) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("ShdPnd:")[1].split()[0], 16) >> signal.SIGTERM - 1 & 1)


def test_a_program_ends_with_its_client(tmp_path: Path, base: Input, warm_python: Path) -> None:
    client, program = stopped(request_for(tmp_path, base), warm_python)
    client.kill()
    client.wait()
    until(lambda: not state(program))


def test_a_program_that_was_killed_is_a_client_that_was_killed(tmp_path: Path, base: Input, warm_python: Path) -> None:
    client, program = stopped(request_for(tmp_path, base), warm_python)
    os.kill(program, signal.SIGKILL)
    assert client.wait(PATIENCE) == -signal.SIGKILL


def test_what_is_no_program_is_for_the_real_python(warm_python: Path, runtime_python: Path) -> None:
    found = subprocess.run([warm_python, "-I", "-c", "import sys; print(sys.executable)"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(runtime_python)
