"""`tuneline worker POOL`: run Prefect's worker for a pool of pipelines.yaml in the foreground, on machines without `tuneline up`.

The worker replaces this process (exec), so that systemd and shells watch the worker itself; see infra/systemd/tuneline-worker@.service.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import urllib.error
from typing import NoReturn

from flows.folders import home_of
from flows.server.api import ask
from flows.server.connect import QUIET, connect
from tuneline.config.load import Loaded
from tuneline.errors import ConfigError, Problem
from tuneline.wording import nearest

LIBRARIES = {"docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}  # process workers need only Prefect


def run_worker(loaded: Loaded, pool: str) -> NoReturn:
    """Replace this process with the worker. Raises ConfigError if the pool, its library or the server is missing."""
    pools = loaded.spec.pools
    if pool not in pools:
        allowed = ", ".join(pools) or "none (the file has no `pools`)"
        raise ConfigError([Problem("", f"found no pool `{pool}`, expected {allowed}", nearest(pool, list(pools)), place="worker")])
    kind = pools[pool].type
    library = LIBRARIES.get(kind)
    if library and importlib.util.find_spec(library.replace("-", "_")) is None:
        found = f"found no {library}, which a {kind} worker needs"
        raise ConfigError([Problem(pool, found, f"`pip install {library}` into the environment of tuneline", place="worker")])
    address = connect(home_of(loaded.root))
    if library and _unknown(address, pool):
        raise ConfigError([Problem(pool, f"found no such pool on the server at {address}", "`tuneline deploy` creates it", place="worker")])
    os.environ |= QUIET
    os.chdir(loaded.root)
    command = worker_command(pool, kind)
    os.execv(command[0], command)


def worker_command(pool: str, kind: str) -> list[str]:
    """Return the worker's command. A process worker creates its pool; other pools have settings, which `tuneline deploy` sets."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", kind, "--name", socket.gethostname()]
    return command if kind == "process" else [*command, "--install-policy", "never", "--no-create-pool-if-not-found"]


def heartbeat(address: str, pool: str) -> str | None:
    """Return the time of the last heartbeat of this machine's worker for a pool, or None."""
    try:
        workers = ask(f"{address}/work_pools/{pool}/workers/filter", {})
    except (OSError, ValueError):  # no such pool yet, or no answer
        return None
    return next((worker["last_heartbeat_time"] for worker in workers if worker["name"] == socket.gethostname()), None)


def _unknown(address: str, pool: str) -> bool:
    try:
        ask(f"{address}/work_pools/{pool}")
        return False
    except urllib.error.HTTPError as error:
        return error.code == 404  # Prefect reports other errors, such as a rejected password
