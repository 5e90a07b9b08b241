"""`tuneline up` and `down`: a persistent Prefect server on loopback, and a worker for each pool of this machine.

Each process has its own session, so it outlives `up` and its terminal. Every user who can log in on this machine can reach the server:
without `--auth`, loopback is its only protection.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flows.server import api, keeper, migrated, server_state, workers
from flows.server.connect import DATABASE, answers, kept, loopback_without_proxy, server_command, wait_for_health
from tuneline.config.load import Loaded
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.watchdog import descendants

PORT = 4200
FLOW_SECONDS, END_SECONDS = 15.0, 10.0  # in which runs must stop their programs (grace: 3 s); in which workers and the server must end
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
DATABASES = {"postgresql+asyncpg": "postgresql+asyncpg://user@host/name", "sqlite+aiosqlite": "sqlite+aiosqlite:////folder/file.db"}


@dataclass(frozen=True)
class Up:
    state: server_state.State
    started: list[str]
    """What was not running already: `server`, `worker POOL`."""


@dataclass(frozen=True)
class Ended:
    role: str
    pid: int
    flow_run: str | None = None


def up(loaded: Loaded, port: int | None, database: str | None, auth: str | None, say: Callable[[str], None]) -> Up:
    """Start what is not running yet. `auth`: the `user:password` that the server requires.

    Raises ConfigError if the call contradicts what is running, StageFailed if a process does not start.
    """
    folder, started = server_state.folder_of(loaded.root), []
    loopback_without_proxy()
    with server_state.alone(folder):
        state = server_state.read(folder)
        if state and (origin := server_state.origin_of(folder, state)) != folder:
            say(f"ending what `up` started before this folder was moved (it was {origin.parent.parent})")
            end_all(origin, state, moved=True)
        port = port or (state.port if state else PORT)
        _refuse(folder, state, port, database, auth)
        if auth:
            server_state.keep_password(folder, auth)
        os.environ |= server_state.password(folder)
        if state is None or not _runs(state):
            say(f"starting a Prefect server on port {port} (the first start on a machine takes half a minute: it creates the database)")
            before = {"workers": state.workers, "keeper": state.keeper} if state else {}
            state = _start_server(folder, port, database, loaded.spec.history).model_copy(update=before)
            server_state.write(folder, state)
            started.append("server")
        for name in [name for name in state.workers if name not in loaded.spec.pools]:
            workers.end(state.workers.pop(name))
            server_state.write(folder, state)
        started += [f"worker {name}" for name in workers.start(loaded, folder, state, say)]
        if state.keeper is None or not state.keeper.alive:
            state.keeper = keeper.start(loaded, folder, state)
            server_state.write(folder, state)
    return Up(state, started)


def _refuse(folder: Path, state: server_state.State | None, port: int, database: str | None, auth: str | None) -> None:
    problems = []
    place = _without_secrets(database) if database else None
    if place and place.partition("://")[0] not in DATABASES:
        found = f"found an address that begins with `{place.partition('://')[0][:20]}`, expected {' or '.join(DATABASES.values())}"
        problems.append(Problem("", found, place="--database"))
    elif state and place != state.database and (place or not _runs(state)):
        found = f"found {place or 'none'}, but the server that `up` started has {state.database or 'a file of its own'}"
        problems.append(Problem("", found, "use that database, or run `tuneline down` first", place="--database"))
    if auth and state and _runs(state) and server_state.password(folder).get(api.AUTH) != auth:
        found = "found a password, but the server that `up` started uses another one, or none"
        problems.append(Problem("", found, "`tuneline down` first", place="--auth"))
    if state and port != state.port and server_state.ours(folder):
        found = f"found {port}, but the server of `up` runs on port {state.port}"
        problems.append(Problem("", found, "`tuneline down` first", place="--port"))
    configured = api.setting(api.URL)
    if configured and configured.rstrip("/") != _address(port):
        found = f"found {configured}: runs would use that server, not the one of `up`"
        problems.append(Problem("", found, "unset it; for that server, `tuneline worker POOL` starts a worker", place="PREFECT_API_URL"))
    if problems:
        raise ConfigError(problems)


def _address(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _runs(state: server_state.State) -> bool:
    return state.server.alive and answers(state.address)


def _without_secrets(database: str) -> str:
    kind, _, rest = database.partition("://")
    return f"{kind}://{rest.rpartition('@')[2].partition('?')[0]}"


def _start_server(folder: Path, port: int, database: str | None, history: str) -> server_state.State:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections in TIME_WAIT do not block the port
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            found = f"found {port}, which cannot be bound ({os.strerror(error.errno or 0)}), expected a free port"
            raise ConfigError(
                [Problem("", found, f"`tuneline up --port {port + 1}`, or stop the process that uses it", place="--port")]
            ) from None
    address, log = _address(port), folder / "server.log"
    place = database or f"sqlite+aiosqlite:///{folder}/prefect.db"
    # Without PREFECT_UI_API_URL the UI calls port 4200, whatever port serves it.
    settings = {"PREFECT_UI_API_URL": address, "PREFECT_SERVER_UI_ENABLED": "true", **kept(history), **dict.fromkeys(DATABASE, place)}
    settings["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = LEASES  # in memory, a restart would forget which run holds its deployment's slot
    if password := server_state.password(folder).get(api.AUTH):
        settings["PREFECT_SERVER_API_AUTH_STRING"] = password
    if database is None:
        settings |= migrated.prepare(folder / "prefect.db")
    process = workers.spawn(server_command(port), folder, "server", address, log, settings)
    try:
        wait_for_health(address, process, log, "if the log mentions the database, check `--database`")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return server_state.State(
        address=address, database=_without_secrets(database) if database else None, server=server_state.process(process.pid)
    )


def down(root: Path) -> list[Ended]:
    """End all processes of `up`. Runs in progress shut down gracefully and report to the server; then workers and server end.

    Raises StageFailed if a process cannot be ended.
    """
    folder = server_state.folder_of(root)
    if not folder.is_dir():
        return []
    with server_state.alone(folder):
        state = server_state.read(folder)
        origin = server_state.origin_of(folder, state) if state else folder
        ended = end_all(origin, state, moved=origin != folder)
        for name in ("state.json", "auth"):
            (folder / name).unlink(missing_ok=True)
    return ended


def end_all(folder: Path, state: server_state.State | None, moved: bool) -> list[Ended]:
    """End all processes of the `up` of a folder, except this one. `moved`: the folder may be another project's now, with its own `up` on
    another port."""

    def ours() -> list[server_state.Ours]:
        found = [process for process in server_state.ours(folder) if process.pid != os.getpid()]
        return [process for process in found if state and process.address == state.address] if moved else found

    def pids() -> set[int]:
        return {process.pid for process in ours()}

    working = {process.pid for process in state.workers.values() if process.alive} if state else set()
    _signal({process.pid for process in ours() if process.role == keeper.ROLE}, signal.SIGTERM)
    _signal(working, signal.SIGSTOP)  # on SIGTERM a worker kills its runs at once, and before that it would take new ones
    found = ours()  # once no worker starts another run
    servers = {process.pid for process in found if process.role == "server"}
    flows = {process.pid for process in found if process.flow_run}
    try:
        _signal(flows, signal.SIGTERM)
        _wait(lambda: not flows & pids(), FLOW_SECONDS)
    finally:  # also on Ctrl-C: a stopped worker would look alive forever
        _signal(working, signal.SIGTERM)
        _signal(working, signal.SIGCONT)
    _wait(lambda: not pids() - servers, END_SECONDS)
    _signal(servers, signal.SIGTERM)
    _wait(lambda: not pids(), END_SECONDS)
    while left := pids():  # includes processes that started meanwhile
        _signal({*left, *(child for pid in left for child in descendants(pid))}, signal.SIGKILL)
        if not _wait(lambda: not pids(), END_SECONDS):
            raise StageFailed(
                "bug", f"processes cannot be ended: {', '.join(map(str, sorted(left)))}", "kill them, then run `tuneline down`"
            )
    return [Ended(process.role if not process.flow_run else "run", process.pid, process.flow_run) for process in _reported(found, working)]


def _reported(found: list[server_state.Ours], working: set[int]) -> list[server_state.Ours]:
    """Return the servers, workers and runs, without the programs below them."""
    return [process for process in found if process.flow_run or process.role == "server" or process.pid in working]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
