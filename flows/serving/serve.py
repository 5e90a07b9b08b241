"""Serves models of one base by vLLM: checks what they have in common, starts the server, and waits for a signal."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from flows.machine import visible_gpus
from flows.run.slots import Slots
from flows.serving.program import LineProgram
from tuneline.errors import ConfigError, Problem
from tuneline.kinds.engine import CPU_RUNTIME, GPU_RUNTIME
from tuneline.kinds.training import Training
from tuneline.planning.built import Built, input_of_model, request_of
from tuneline.wording import listed
from tuneline.workspace.protocol import Input
from tuneline.workspace.runtimes import ready_runtime
from tuneline.workspace.workspace import Workspace

PROGRAM = "tasks.serving.server"
VARIABLE = "TUNELINE_API_KEY"
LOGS = "serving"  # folder in .tuneline
GRACE = "30"  # seconds that requests in progress have once the server is asked to end


@dataclass(frozen=True)
class Key:
    """What clients must send, and where it comes from: an option, a file, or the environment."""

    given: str | None
    file: Path | None

    def text(self) -> str:
        """Return the key; an empty one lets everybody ask. Raises ConfigError for two keys, and for an empty file."""
        if self.given is not None and self.file is not None:
            raise ConfigError([Problem("", "found --api-key and --api-key-file", "give one of them", place="--api-key")])
        if self.file is None:
            return self.given or os.environ.get(VARIABLE, "")
        if not (key := self.file.read_text(encoding="utf-8").strip()):
            raise ConfigError([Problem("", f"found an empty file, {self.file}", "write the key into it", place="--api-key-file")])
        return key

    def in_shell(self) -> str:
        """Return what a shell replaces by the key."""
        return f'"$(cat {shlex.quote(str(self.file))})"' if self.file else shlex.quote(self.given) if self.given else f'"${VARIABLE}"'


@dataclass(frozen=True)
class Address:
    host: str
    port: int
    key: str
    key_in_shell: str

    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def curl(self, model: str) -> str:
        """Return a command line that asks the server. The key is passed by a pipe: `ps` shows command lines."""
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
        key = f"printf 'Authorization: Bearer %s' {self.key_in_shell} | " if self.key else ""
        header = " -H @-" if self.key else ""
        return f"{key}curl {self.url()}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def address_of(host: str, port: int, given: Key) -> Address:
    """Raises ConfigError for an address that others reach without a key, or a port that another program uses."""
    key = given.text()
    if not key and not _loopback(host):
        found = f"found {host} without a key: everybody who reaches this machine could use the model"
        hint = f"set {VARIABLE}, or `--api-key-file FILE`; `openssl rand -hex 16` makes a key"
        raise ConfigError([Problem("", found, hint, place="--host")])
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        option, hint = "--host", "`--host` takes an address of this machine"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            option, hint = "--port", "`--port` chooses another port"
        why = str(error.strerror).partition(" (")[0]  # Python adds the address once more
        raise ConfigError([Problem("", f"{host}:{port}: {why}", hint, place=option)]) from None
    return Address(host, port, key, given.in_shell())


def served_inputs(workspace: Workspace, models: list[Built]) -> dict[str, Input]:
    """Return the models by name, with their base. Raises ConfigError unless vLLM can serve them together."""
    inputs = {built.name: input_of_model(workspace, built) for built in models}
    bases = {(given.base or given).digest: name for name, given in inputs.items()}
    if len(bases) > 1:
        raise _apart(models, f"found models of {len(bases)} bases", "serve each base, with its adapters, by a command of its own")
    if len({given.template for given in inputs.values()}) > 1:
        raise _apart(models, "found models with different chat templates, and vLLM has one", "serve each by a command of its own")
    for built in models:
        if why := built.stage.unserved(built.evaluation):
            hint = f"`tuneline chat {built.name}` runs it; of an adapter, a merged stage can be served"
            raise ConfigError([Problem("", f"found {why}", hint, place=built.name)])
    if not any(given.type == "Model" for given in inputs.values()):
        stage, base = models[0].stage, inputs[models[0].name].base
        assert isinstance(stage, Training)
        assert base is not None
        inputs[f"{models[0].pipeline}/{stage.model}"] = base
    return inputs


@contextmanager
def served(workspace: Workspace, models: list[Built], address: Address, say: Callable[[str], None]) -> Iterator[LineProgram]:
    """Run the server within the context, in which SIGTERM is what Ctrl-C is. The first model's evaluation decides about devices, data type
    and vLLM's settings."""
    signal.signal(signal.SIGTERM, _interrupt)  # also for process 1 of a container, which ignores what it does not handle
    evaluation, inputs = models[0].evaluation, served_inputs(workspace, models)
    resources = evaluation.resources
    engine = (resources.engine.runtime if resources.engine else None) or (GPU_RUNTIME if resources.gpus else CPU_RUNTIME)
    engine_python = ready_runtime(engine, workspace.loaded.spec, workspace.root).python
    python = ready_runtime(evaluation.runtime, workspace.loaded.spec, workspace.root).python
    log = workspace.home / LOGS / f"{address.port}.log"
    log.parent.mkdir(exist_ok=True)
    with Slots(None, visible_gpus()).taken(resources.gpus, resources.devices, {"stage": "serve"}, say) as taken:
        say(f"starts vLLM, which takes minutes; its log is {log}")
        arguments, variables = (address.host, str(address.port), str(log)), {VARIABLE: address.key, "TUNELINE_GRACE": GRACE}
        with LineProgram(
            PROGRAM, python, lambda folder: request_of(models[0], inputs, folder, engine_python), taken, arguments, variables
        ) as program:
            yield program


def wait(program: LineProgram, say: Callable[[str], None]) -> None:
    """Return once the server has ended: after Ctrl-C or SIGTERM, when the requests in progress are done. A second one ends it at once."""
    try:
        program.receive()
    except KeyboardInterrupt:
        say(f"ends once the requests in progress are done, at the latest after {GRACE} s")
        program.send({"stop": True})
        program.receive()


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _apart(models: list[Built], found: str, hint: str) -> ConfigError:
    return ConfigError([Problem("", f"{found}: {listed(built.name for built in models)}", hint, place="serve")])
