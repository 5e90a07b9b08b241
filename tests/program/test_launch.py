"""What the launcher of several processes sees to before they start; what becomes of them is in program/test_strategies.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from program_tools import ROOT, make_request

from tasks.launch import LOST_PEER, RANKS, transient
from tuneline.workspace.file_names import RENDEZVOUS
from tuneline.workspace.protocol import Failure

LAUNCHER = """\
import sys, time
from pathlib import Path
from tasks.launch import own_extensions
own_extensions(Path(sys.argv[1]))
print("at work", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_build_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    """Unless another training of the runtime is at work, which may be building."""
    left = tmp_path / "some_operator" / "lock"
    left.parent.mkdir()

    def launcher(seconds: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(seconds)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        return process

    left.touch()
    with launcher(60) as other:
        assert not left.exists()
        left.touch()
        with launcher(0):
            assert left.exists()
        other.kill()
    with launcher(0):
        assert not left.exists()


SLOW_AGENT = """\
import sys, time
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api
from tasks import launch

def launch_agent(*arguments):
    work = Path(sys.argv[1]).parent
    (work / "said.json").rename(work / launch.RANKS / f"1{launch.FAILURE_SUFFIX}")
    time.sleep(2)
    raise ChildFailedError("tasks", {1: ProcessFailure(0, 1, 1, "")})

api.launch_agent = launch_agent
sys.exit(launch.main())
"""


@pytest.mark.slow
def test_a_machine_whose_processes_have_ended_is_not_ended_by_itself(tmp_path: Path) -> None:
    """While it waited for the others' failures it sent itself the SIGTERM for processes that wait for a dead one, and reported
    neither failure."""
    fields = {"kind": "sft", "model": "base", "dataset": "data", "resources": {"processes": 1, "nodes": 2}}
    request = make_request(tmp_path, fields, {}, join="tuneline node p")
    (request.work / RANKS).mkdir()
    (request.work / RENDEZVOUS).write_text('{"endpoint": "127.0.0.1:1", "id": "meeting"}')
    request.write(request.work / "request.json")
    transient("its connection broke", LOST_PEER).write(request.work / "said.json")
    here = tmp_path / "machine"
    here.mkdir()
    command = [sys.executable, "-c", SLOW_AGENT, str(request.work / "request.json"), "1"]
    done = subprocess.run(command, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert Failure.read(here / "failure.json").message == "machine 0 of 2 went away or does not answer"
