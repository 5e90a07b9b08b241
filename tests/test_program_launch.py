"""What the launcher of several processes sees to before they start; what becomes of them is in test_program_strategies.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from program_tools import ROOT

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
