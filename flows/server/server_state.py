"""The state of `tuneline up`: which processes it has started, and which of them are alive.

    .tuneline/server/state.json   address, database, and the processes by id and start time
    .tuneline/server/auth         user and password of `up --auth`
    .tuneline/server/*.log        logs                    .tuneline/server/prefect.db   history, unless `--database` names another

A process id alone proves nothing, because the system reuses it. So it is compared together with the start time that /proc shows. The
processes to end are found by UP in their environment, which children inherit even if their parent has ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.folders import home_of, server_in
from flows.server.api import AUTH, URL
from tuneline.files import hold_lock, write_atomically

UP = "TUNELINE_UP"  # environment variable of all processes that `up` started: the folder of its state
ROLE = "TUNELINE_ROLE"  # and their role: server, keeper or worker POOL
FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # set by Prefect for the process of a run; programs do not inherit it


class Process(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    pid: int
    started: int
    """Start time in clock ticks since boot."""

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started


class State(BaseModel):
    model_config = ConfigDict(extra="forbid")
    address: str
    """Address of the API."""
    database: str | None
    """Address without user and password; None for the SQLite file in the same folder."""
    server: Process
    workers: dict[str, Process] = {}
    """Workers by pool."""
    keeper: Process | None = None
    """Restarts workers that died (`flows.server.keeper`)."""

    @property
    def ui(self) -> str:
        return self.address.removesuffix("/api")

    @property
    def port(self) -> int:
        return int(self.ui.rpartition(":")[2])


@dataclass(frozen=True)
class Ours:
    """A process that `up` or one of its processes has started."""

    pid: int
    role: str
    flow_run: str | None
    address: str | None
    """Of the server for which it works; programs do not inherit it."""


def folder_of(root: Path) -> Path:
    """Return the folder of a project's state, the same one through every symbolic link to the project."""
    return server_in(home_of(root)).resolve()


def read(folder: Path) -> State | None:
    """Return the state, or None if there is none, it cannot be read, or it is a copy of another project's state."""
    state = _read(folder)
    origin = origin_of(folder, state) if state else None
    return None if origin and origin != folder.resolve() and _read(origin) == state else state


def _read(folder: Path) -> State | None:
    with contextlib.suppress(OSError, ValidationError):
        return State.model_validate_json((folder / "state.json").read_bytes())
    return None


def origin_of(folder: Path, state: State) -> Path:
    """Return the folder that the live processes of a state use. It differs if the project was moved or copied."""
    for process in (state.server, *filter(None, [state.keeper]), *state.workers.values()):
        if process.alive and (origin := _environment(process.pid).get(UP)):
            return Path(origin)
    return folder.resolve()


def write(folder: Path, state: State) -> None:
    write_atomically(folder / "state.json", state.model_dump_json(indent=1))


def password(folder: Path) -> dict[str, str]:
    """Return PREFECT_API_AUTH_STRING for the server of `up --auth`, from a file that only its user may read."""
    with contextlib.suppress(OSError):
        return {AUTH: (folder / "auth").read_text(encoding="utf-8")}
    return {}


def keep_password(folder: Path, text: str) -> None:
    with open(os.open(folder / "auth", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of this project's `up` and `down`."""
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "lock"):
        yield


def start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot, or None if it has ended (also as a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def process(pid: int) -> Process:
    return Process(pid=pid, started=start_time(pid) or 0)


def ours(folder: Path) -> list[Ours]:
    """Return all processes that were started for the `up` of this folder."""
    mark, found = str(folder), []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        values = _environment(pid)
        if values.get(UP) == mark:
            found.append(Ours(pid, values.get(ROLE, ""), values.get(FLOW_RUN), values.get(URL)))
    return found


def _environment(pid: int) -> dict[str, str]:
    """Return the environment of a process; empty if it has ended or belongs to another user."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(os.fsdecode(variable).partition("=")[::2] for variable in variables)
    return {}
