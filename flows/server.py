"""A Prefect server for one run, where nobody configured one.

Prefect's own ephemeral server outlives a flow that is killed with -9, and two of them on one database can lock each other out.
Ours is the same server as a child under our watchdog, so it goes when the run goes, and each run at the same time has a
database of its own: `.tuneline/prefect/0.db`, or the next that nobody holds. History and the UI need a lasting server.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.supervisor import WATCHDOG
from tuneline.errors import ConfigError, Problem, StageFailed

STARTUP_SECONDS = 180  # migrations of a new database took 22 s on two busy cores
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
}


def server_configured() -> bool:
    return bool(os.environ.get("PREFECT_API_URL"))


def require_server() -> None:
    """Raises ConfigError where PREFECT_API_URL names a server that does not answer: Prefect itself would end in a traceback."""
    address = os.environ["PREFECT_API_URL"].rstrip("/")
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10):
            return
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code != 404:  # it answers; whether it lets us in is Prefect's to say
                return
        hint = "start it, or unset PREFECT_API_URL: each run then brings a server of its own"
        raise ConfigError([Problem("PREFECT_API_URL", "", f"found no Prefect server at {address} ({error})", hint)]) from None


def find_server(home: Path) -> str | None:
    """Address of the API of a server that lasts. `home` is `.tuneline`."""
    return os.environ.get("PREFECT_API_URL") or None


def connect(home: Path) -> str:
    """As `find_server`, and raises ConfigError where there is none or it does not answer. To be called before prefect is imported."""
    address = find_server(home)
    if address is None:
        raise ConfigError(
            [Problem("PREFECT_API_URL", "", "found no Prefect server, allowed the address of one", "`tuneline up` starts one")]
        )
    os.environ["PREFECT_API_URL"] = address
    require_server()
    return address


@contextmanager
def embedded_server(home: Path, on_death: Callable[[str], None] = lambda message: None) -> Iterator[str]:
    """Starts a server on loopback and yields its API address, also set as PREFECT_API_URL. `home` is `.tuneline/prefect`.
    `on_death` is called, from another thread, should it end before we do.

    Must be entered before prefect is imported, which reads its settings once.
    """
    home.mkdir(parents=True, exist_ok=True)
    os.environ.update({"PREFECT_HOME": str(home), **QUIET})
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")  # if it has gone, it does not come back
    for name in ("NO_PROXY", "no_proxy"):  # a proxy cannot reach our loopback
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    with _free_database(home) as (database, lock):
        port = _free_port()
        url = f"http://127.0.0.1:{port}/api"
        os.environ["PREFECT_API_URL"] = url
        environment = {
            **os.environ,
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
        }
        uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1"]
        log = database.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WATCHDOG), *uvicorn, "--port", str(port), "--log-level", "warning"],
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
                on_death(f"the Prefect server has ended; the stages go on without it (its log: {log})")

        try:
            import prefect  # noqa: F401  (3 s of imports, while the server starts)

            _wait_for_health(url, process, log)
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
    """The first database that no other run holds, and the descriptor whose flock holds it."""
    number = 0
    while True:
        descriptor = os.open(home / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            os.close(descriptor)
            number += 1
    try:
        yield home / f"{number}.db", descriptor
    finally:
        os.close(descriptor)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise StageFailed(
        "bug", f"the embedded Prefect server did not start; the end of {log}:\n{tail}", "set PREFECT_API_URL to a server of yours"
    )
