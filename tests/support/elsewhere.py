"""A process with another folder, environment and order of sets, which runs programs in a row: what they write must not depend on it.

One for all kinds: its imports take longer than the programs themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tuneline.workspace.protocol import Request

ROOT = Path(__file__).resolve().parents[2]


class Elsewhere:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "123"}
        pipe = subprocess.PIPE
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], cwd=folder, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True
            )

    def run(self, request: Request) -> None:
        file = request.work / "request.json"
        request.write(file)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "0\n", self.log.read_text()

    def end(self) -> None:
        self._process.communicate()


def main() -> None:
    import tasks.__main__ as program

    program.hide = lambda request: None  # the next one may need it
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = Path(line.removesuffix("\n"))
        os.chdir(request.parent)
        sys.argv = ["tasks", str(request)]
        print(program.main(), file=said, flush=True)


if __name__ == "__main__":
    main()
