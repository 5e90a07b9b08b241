"""Starts a program that stays: it reads lines of JSON from a pipe and writes others to its stdout, under the watchdog.

    with LineProgram("tasks.serving.chat", python, request, taken) as program:
        program.send({"ask": {"messages": [...]}, "settings": {}})
        document = program.receive()

However this process ends, even by `kill -9`, the watchdog ends the program with all its descendants and removes its folder.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.run.slots import Taken
from flows.run.supervisor import WATCHDOG, WORK, program_environment
from tuneline.errors import StageFailed
from tuneline.secrets import masked
from tuneline.workspace.file_names import REQUEST
from tuneline.workspace.protocol import Request

LAST_LINES = 20  # of the program's stderr, in the message about its end


class LineProgram:
    """`request` gets the program's folder, which is new and empty; `arguments` follow the pipe's descriptor; `variables` are added to its
    environment."""

    def __init__(
        self,
        module: str,
        python: Path,
        request: Callable[[Path], Request],
        taken: Taken,
        arguments: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
    ):
        folder = Path(tempfile.mkdtemp(prefix="tuneline-"))
        made = request(folder)
        made.write(folder / REQUEST)
        self.name = made.name
        reading, self._writing = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the program)
        command = [str(python), "-m", module, str(folder / REQUEST), str(reading), *arguments]
        environment = program_environment(folder, taken.gpus) | {WORK: str(folder), "TUNELINE_LEFT_TO_WATCHDOG": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WATCHDOG), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, cwd=folder,
            env=environment | (variables or {}), start_new_session=True, pass_fds=(reading, *taken.descriptors),
        )  # fmt: skip
        os.close(reading)
        self._received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> LineProgram:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def send(self, document: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # it has ended: `receive` says how
            os.write(self._writing, json.dumps(document).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for the next line. Raises StageFailed if the program reports a failure in its place, or has ended."""
        document = self._received.get()
        if document is None:
            self._received.put(None)
            raise self._ended()
        if document["type"] == "failed":
            raise StageFailed(document["class"], f"{self.name}: {document['message']}", document["hint"])
        return document

    def end(self) -> None:
        """Kill it with all its descendants. Returns once they are gone."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it has ended
            self._process.stdin.write(b"e")
            self._process.stdin.flush()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        os.close(self._writing)
        self._stderr.close()

    def _listen(self) -> None:
        """Pass lines on. Reads in a thread of its own, because Ctrl-C could interrupt a read in the middle of a line."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._received.put(json.loads(line))
        self._received.put(None)

    def _ended(self) -> StageFailed:
        status = self._process.wait()
        self._stderr.seek(0)
        said = masked(self._stderr.read()).decode(errors="replace").splitlines()[-LAST_LINES:]
        message = f"{self.name}: its program ended with status {status}" + ("; its last lines:\n" if said else "") + "\n".join(said)
        killed = status == 128 + 9
        return StageFailed("oom" if killed else "bug", message, "the machine may lack memory for the model" if killed else "")
