"""What `tuneline up` has started and written down, and which of it lives.

    .tuneline/server/state.json   address, database, and the processes by number and start time
    .tuneline/server/auth         user and password of `up --auth`
    .tuneline/server/*.log        what they say           .tuneline/server/prefect.db   history, unless `--database` names another

A process number alone proves nothing: the system gives it to another process later. So it counts only with the start time that
/proc shows, and what is to be ended is found by UP in its environment, which children inherit, whoever their parent is by now.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.server.api import AUTH, URL

UP = "TUNELINE_UP"  # in the environment of all that `up` started: the folder of its state
ROLE = "TUNELINE_ROLE"  # and what it was started as
FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # in that of a run's process, by Prefect; programs do not inherit it


class Process(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    pid: int
    started: int
    """Clock ticks since the machine's start."""

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started


class State(BaseModel):
    model_config = ConfigDict(extra="forbid")
    address: str
    """Of the API."""
    database: str | None
    """Where it lies, without user and password; None for the SQLite file beside this one."""
    server: Process
    workers: dict[str, Process] = {}
    """By pool."""
    keeper: Process | None = None
    """What starts a worker again that died."""

    @property
    def ui(self) -> str:
        return self.address.removesuffix("/api")

    @property
    def port(self) -> int:
        return int(self.ui.rpartition(":")[2])


@dataclass(frozen=True)
class Ours:
    """A process that `up`, or what it started, has started."""

    pid: int
    role: str
    flow_run: str | None
    address: str | None
    """Of the server for which it works; programs do not inherit it."""


def folder_of(root: Path) -> Path:
    """Where the state of a project lies, the same one by whatever path the project is reached."""
    return (root / ".tuneline" / "server").resolve()


def read(folder: Path) -> State | None:
    """None where nothing is, or nothing that can be read, or the copy of another project's state."""
    state = _read(folder)
    origin = origin_of(folder, state) if state else None
    return None if origin and origin != folder.resolve() and _read(origin) == state else state


def _read(folder: Path) -> State | None:
    with contextlib.suppress(OSError, ValidationError):
        return State.model_validate_json((folder / "state.json").read_bytes())
    return None


def origin_of(folder: Path, state: State) -> Path:
    """The folder for which the living processes of a state work: another one if the project was moved, or copied, since."""
    for process in (state.server, *filter(None, [state.keeper]), *state.workers.values()):
        if process.alive and (origin := _environment(process.pid).get(UP)):
            return Path(origin)
    return folder.resolve()


def write(folder: Path, state: State) -> None:
    temporary = folder / ".state.json"
    temporary.write_text(state.model_dump_json(indent=1), encoding="utf-8")
    temporary.replace(folder / "state.json")


def password(folder: Path) -> dict[str, str]:
    """PREFECT_API_AUTH_STRING for the server of `up --auth`, from a file that its user alone may read."""
    with contextlib.suppress(OSError):
        return {AUTH: (folder / "auth").read_text(encoding="utf-8")}
    return {}


def keep_password(folder: Path, text: str) -> None:
    with open(os.open(folder / "auth", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other `up` or `down` of this project meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def start_time(pid: int) -> int | None:
    """In clock ticks since the machine's start; None for a process that has ended, collected by its parent or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def process(pid: int) -> Process:
    return Process(pid=pid, started=start_time(pid) or 0)


def ours(folder: Path) -> list[Ours]:
    """Everything that works for the `up` of this folder, now."""
    mark, found = str(folder), []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        values = _environment(pid)
        if values.get(UP) == mark:
            found.append(Ours(pid, values.get(ROLE, ""), values.get(FLOW_RUN), values.get(URL)))
    return found


def _environment(pid: int) -> dict[str, str]:
    """Empty for a process that has ended, or is another user's."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(os.fsdecode(variable).partition("=")[::2] for variable in variables)
    return {}
