"""Starts and stops the process of a vLLM server, which never outlives its program.

vLLM has a runtime of its own (its versions and torch's exclude ours), so programs use it over HTTP on the loopback, with a
key that only the program and its server know. It runs under `tuneline.watchdog`, whose stdin this program holds open:
however the program ends, even by `kill -9`, the server and its workers are ended too.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline import watchdog
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from httpx2 import Client, Response

POLL = 0.3  # seconds between checks whether it is ready
ENDING_SECONDS = 10  # a server whose worker has died needs some time to end
END_SECONDS = watchdog.GRACE + 10  # a killed process with a GPU needs seconds to end
LAST_LINES, LINE_WIDTH, ERROR_LINES = 20, 300, 3  # of the log in a message: lines, characters, and lines from the last error on
NOT_FOR_IT = (
    "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHASHSEED", "HF_TOKEN", "CUDA_VISIBLE_DEVICES",
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
)  # fmt: skip
"""Variables that the server does not get: those for our own Python, secrets, and those that torchrun sets for a training's processes."""
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "NO_COLOR": "1",
    "TQDM_DISABLE": "1",
}  # fmt: skip
AGAIN = "the stage is tried again"
OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "can't allocate memory", "No available memory for the cache", "is less than desired")

_ERROR = re.compile(r" ERROR |^[A-Za-z_.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Place:
    """Where a server runs."""

    python: Path
    """Interpreter of the runtime that holds vLLM."""
    log: Path
    """File that gets all its output."""
    gpus: Sequence[int | str] | None = None
    """Visible devices, as in CUDA_VISIBLE_DEVICES; None on a CPU."""
    memory: Path | None = None
    """Folder that is removed with the server, however the program ends."""


class Server:
    """Runs one server. `arguments` are those of vLLM's server except where it listens; `timeout`: seconds until it must be ready."""

    def __init__(self, place: Place, arguments: Sequence[str], timeout: float):
        self.place, self.arguments, self.timeout = place, arguments, timeout
        self.process: subprocess.Popen[bytes] | None = None
        self.host, self.port, self.key = "127.0.0.1", 0, secrets.token_hex(16)
        self.variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}

    def start(self) -> None:
        """Return once the server answers. Raises StageFailed with the end of its log if it does not start."""
        self.port = self.port or _free_port()
        command = [str(self.place.python), "-m", "vllm.entrypoints.openai.api_server", *self.arguments]
        command += ["--host", self.host, "--port", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_IT} | QUIET | self.variables
        environment["VLLM_API_KEY"] = self.key
        if self.place.memory is not None:
            environment["TUNELINE_LEFT_TO_WATCHDOG"] = str(self.place.memory)
        if self.place.gpus is None:  # use all cores: by default vLLM reserves one for its other processes, which only wait
            environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        if self.place.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.place.gpus))
        with self.place.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", watchdog.__file__, *command],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.place.log.parent,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        from httpx2 import TransportError

        assert self.process is not None
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.ended("before it was ready")
            try:
                self._accepted(self.client.get("/v1/models"))
                return
            except (OSError, TransportError):
                time.sleep(POLL)
        message = f"vLLM was not ready after {self.timeout:.0f} s; the end of {self.place.log.name}:\n{self.tail()}"
        raise StageFailed("transient", message, "allow more time with `resources: {engine: {start_timeout: ...}}`")

    def drain(self, seconds: float) -> None:
        """Let requests in progress finish, at most for so long. Only vLLM's main process gets SIGTERM: a worker would end at once."""
        assert self.process is not None
        for main in watchdog.descendants(self.process.pid)[:1]:
            os.kill(main, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def stop(self) -> None:
        """Send SIGTERM to all of its processes, SIGKILL after the watchdog's grace period. Returns when none is left."""
        self.client.close()
        if self.process is None:  # another process started it, or it has been stopped
            return
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(b"x")
            self.process.wait(END_SECONDS)
        except BrokenPipeError:  # the server has already ended
            self.process.wait()
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        finally:
            stdin.close()
            self.process = None

    @property
    def reached(self) -> str:
        """Return the address by which this machine reaches it."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else f"[{self.host}]" if ":" in self.host else self.host

    @cached_property
    def client(self) -> Client:
        """An HTTP client of this server; proxies of the environment do not apply."""
        from httpx2 import Client, Limits

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        every = Limits(max_connections=None)  # as many as vLLM works on at the same time
        address = f"http://{self.reached}:{self.port}"
        return Client(base_url=address, headers=headers, timeout=None, limits=every, trust_env=False, verify=False)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the answer's text. Raises StageFailed(bug) with the server's message if it refuses."""
        from httpx2 import TransportError

        try:
            response = self.client.request(method, path, json=body)
            self._accepted(response)
            return response.text
        except (OSError, TransportError) as error:
            raise self._broken(error) from error

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed answer. The server refuses before the first event; an error event ends the stream."""
        from httpx2 import TransportError

        try:
            with self.client.stream("POST", path, json=body) as response:
                self._accepted(response)
                for line in response.iter_lines():
                    text = line.removeprefix("data: ").strip()
                    if text == "[DONE]":
                        return
                    if text:
                        event = json.loads(text)
                        if "error" in event:
                            raise ConnectionError(event["error"]["message"])
                        yield event
        except (OSError, TransportError) as error:
            raise self._broken(error) from error
        raise self._broken(EOFError("the answer ends early"))

    def _accepted(self, response: Response) -> None:
        """Raises StageFailed(bug) if the server refuses the request, ConnectionError if it has broken."""
        if response.status_code == 200:
            return
        words = _message(response.read().decode())
        if response.status_code >= 500 and self.client.get("/health").status_code != 200:
            raise ConnectionError(words)
        request = f"{response.request.method} {response.request.url.path}"
        raise StageFailed("bug", f"vLLM answers {request} with {response.status_code}: {words}", f"see {self.place.log}")

    def _broken(self, error: Exception) -> StageFailed:
        if self.process is not None:
            try:
                self.process.wait(ENDING_SECONDS)
                return self.ended("while it was working")
            except subprocess.TimeoutExpired:
                pass
        message = f"vLLM did not complete an answer ({error}); the end of {self.place.log.name}:\n{self.tail()}"
        return StageFailed("transient", message, AGAIN)

    def ended(self, when: str) -> StageFailed:
        """Return the failure, with the cause that its log shows."""
        assert self.process is not None
        status, said = self.process.returncode, self.place.log.read_text(encoding="utf-8", errors="replace")
        message = f"vLLM ended with status {status} {when}; the end of {self.place.log.name}:\n{self.tail()}"
        settings = "`resources: {engine: ...}`"
        if any(words in said for words in OUT_OF_MEMORY) or status == 128 + signal.SIGKILL:
            hint = f"lower `gpu_memory_utilization` (`cpu_memory` without a GPU) or `max_num_seqs` of {settings}"
            return StageFailed("oom", message, hint)
        if "address already in use" in said:
            return StageFailed("transient", message, f"another process took its port; {AGAIN}")
        if when.startswith("before"):
            hint = f"see its log: vLLM does not support this model, or a setting under {settings} is wrong"
            return StageFailed("config", message, hint)
        return StageFailed("transient", message, AGAIN)

    def tail(self) -> str:
        """Return the end of its log, up to the last error and its message: what libraries print while they end is useless."""
        lines = self.place.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [i for i, line in enumerate(lines) if _ERROR.search(line)]
        end = errors[-1] + ERROR_LINES if errors else len(lines)
        return "\n".join(line[:LINE_WIDTH] for line in lines[:end][-LAST_LINES:])


def _message(answer: str) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:500]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
