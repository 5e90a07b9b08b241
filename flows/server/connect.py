"""Find or start the Prefect server of a run: the one of Prefect's settings, else that of `tuneline up`, else an embedded server.

Prefect's own ephemeral server outlives a flow that is killed with -9, and two of them on one database can lock each other out.
Ours is the same server as a child under our watchdog, so it ends with the run. Concurrent runs use separate databases:
`.tuneline/prefect/0.db`, or the next one that is not locked. Only a persistent server has history and a UI.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.folders import server_in
from flows.server import api, migrated, server_state
from tuneline import watchdog
from tuneline.config.pools import interval
from tuneline.errors import ConfigError, Problem, StageFailed
from tuneline.files import open_lock, try_lock
from tuneline.paths import PACKAGES_ROOT

STARTUP_SECONDS = 180  # the migrations of a new database took 22 s on two busy cores
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
}
HISTORY = "90d"
NO_UI = {"PREFECT_SERVER_UI_ENABLED": "false"}
DATABASE = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")  # the second is its old name


def kept(history: str) -> dict[str, str]:
    """Return the server settings that remove runs which ended longer ago than `history`, with their logs and artifacts.

    Prefect's own service does this every hour; the minimum is an hour.
    """
    seconds = max(3601.0, interval(history).total_seconds())
    vacuum = "PREFECT_SERVER_SERVICES_DB_VACUUM_"
    return {f"{vacuum}ENABLED": "events,flow_runs", f"{vacuum}RETENTION_PERIOD": f"{seconds:.0f}"}


def find_server(home: Path) -> str | None:
    """Return the API address in Prefect's settings, whether it answers or not, else that of `tuneline up` if it answers, else None.

    `home` is `.tuneline`.
    """
    if configured := api.setting(api.URL):
        return str(configured)
    folder = server_in(home).resolve()
    state = server_state.read(folder)
    if state is None or not state.server.alive or server_state.origin_of(folder, state) != folder:  # a moved project's server
        return None  # writes to the old folder
    return state.address if answers(state.address) else None


def connect(home: Path) -> str:
    """Return the server's API address and set it as PREFECT_API_URL.

    Must be called before prefect is imported, which reads its settings once. Raises ConfigError if there is no server, if the one of
    Prefect's settings does not answer (Prefect itself would end in a traceback), or if it rejects the password.
    """
    configured, address = api.setting(api.URL), find_server(home)
    if address is None:
        found = "found no address of a Prefect server, and no running server of `tuneline up`"
        raise ConfigError([Problem("", found, "`tuneline up` starts one", place=api.URL)])
    loopback_without_proxy()
    if configured:
        _require(configured.rstrip("/"))
    else:
        os.environ |= {"PREFECT_HOME": str(server_in(home)), "DO_NOT_TRACK": "1"}
    os.environ[api.URL] = address
    if (state := server_state.read(server_in(home))) and state.address == address.rstrip("/"):
        os.environ |= server_state.password(server_in(home))
    for name in (api.AUTH, api.KEY):  # wherever they are set: values in the environment are masked in logs
        if value := api.setting(name):
            os.environ[name] = str(value)
    api.admitted(address.rstrip("/"))
    return address


def answers(address: str) -> bool:
    loopback_without_proxy()
    try:
        api.ask(f"{address}/health")
        return True
    except (OSError, ValueError):
        return False


def loopback_without_proxy() -> None:
    """Exclude loopback from proxies, which cannot reach it."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = os.environ.get(name, "").split(",")
        os.environ[name] = ",".join(dict.fromkeys([*filter(None, hosts), "127.0.0.1", "localhost"]))


def _require(address: str) -> None:
    try:
        api.ask(f"{address}/health")
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code != 404:  # it answers; `admitted` checks the password next
            return
        hint = "start it (`tuneline up`, if it was that one), or unset PREFECT_API_URL: each run then starts its own server"
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            hint = f"{api.CERTIFICATES} must name a file with the certificate of the authority that signed the server's"
        raise ConfigError([Problem("", f"found no Prefect server at {address} ({error})", hint, place=api.URL)]) from None


@contextmanager
def embedded_server(home: Path, on_death: Callable[[str], None] = lambda message: None, history: str = HISTORY) -> Iterator[str]:
    """Start a server on loopback and yield its API address, also set as PREFECT_API_URL. `home` is `.tuneline/prefect`.

    Must be entered before prefect is imported, which reads its settings once. Calls `on_death` from another thread if the server ends
    before this process does.
    """
    home.mkdir(parents=True, exist_ok=True)
    os.environ.update({"PREFECT_HOME": str(home), **QUIET, **NO_UI})
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")  # a server that has ended does not come back
    loopback_without_proxy()
    with _free_database(home) as (database, lock):
        port = free_port()
        url = f"http://127.0.0.1:{port}/api"
        os.environ["PREFECT_API_URL"] = url
        environment = {
            **os.environ,
            **kept(history),
            **dict.fromkeys(DATABASE, f"sqlite+aiosqlite:///{database}"),
            **migrated.prepare(database),
        }
        log = database.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", watchdog.__file__, *server_command(port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(lock,),
            )
        ended = threading.Event()

        def watch() -> None:
            process.wait()
            if not ended.is_set():
                on_death(f"the Prefect server has ended; the stages continue without it (its log: {log})")

        try:
            import prefect  # noqa: F401  (3 s of imports, while the server starts)

            wait_for_health(url, process, log, "set PREFECT_API_URL to a running server")
            threading.Thread(target=watch, daemon=True).start()
            yield url
        finally:
            ended.set()
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            del os.environ["PREFECT_API_URL"]


@contextmanager
def _free_database(home: Path) -> Iterator[tuple[Path, int]]:
    """Lock the first database that no other run holds. Yields its path and the descriptor of the lock."""
    number = 0
    while True:
        descriptor = open_lock(home / f"{number}.lock")
        if try_lock(descriptor):
            break
        os.close(descriptor)
        number += 1
    try:
        yield home / f"{number}.db", descriptor
    finally:
        os.close(descriptor)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_command(port: int) -> list[str]:
    """Return the command of the server itself: `prefect server start` would add a process and a pid file that outlives it."""
    uvicorn = [sys.executable, "-P", "-m", "uvicorn", "--factory", "flows.server.prefect_app:create_app", "--log-level", "warning"]
    uvicorn += ["--app-dir", str(PACKAGES_ROOT)]  # the default is the current folder, which would come first on the path
    return [*uvicorn, "--host", "127.0.0.1", "--port", str(port), "--timeout-graceful-shutdown", "3"]  # an open page delays it


def wait_for_health(address: str, process: subprocess.Popen[bytes], log: Path, hint: str) -> None:
    """Wait until the server answers. Raises StageFailed with the end of its log if it does not start."""
    deadline, port = time.monotonic() + STARTUP_SECONDS, int(address.removesuffix("/api").rpartition(":")[2])
    while time.monotonic() < deadline and process.poll() is None:
        if listens(process.pid, port) and answers(address):
            return
        time.sleep(0.1)
    raise StageFailed("bug", f"the Prefect server did not start; the end of {log}:\n{tail(log)}", hint)


def listens(pid: int, port: int) -> bool:
    """Return whether the process or a descendant listens on the port. Another server, started at the same moment, may answer there."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{fields[9]}]" for fields in lines if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"}
    for process in (pid, *watchdog.descendants(pid)):
        with contextlib.suppress(OSError):
            if any(os.readlink(link) in sockets for link in Path(f"/proc/{process}/fd").iterdir()):
                return True
    return False


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
