"""`tuneline worker POOL`: Prefect's worker for a pool of pipelines.yaml, in the foreground, for the machines on which no `up` runs.

It takes the place of this process, so that systemd and shells watch the worker itself; see infra/systemd/tuneline-worker@.service.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import urllib.error
from typing import NoReturn

from flows.server.api import ask
from flows.server.connect import QUIET, connect
from tuneline.config.load import Loaded
from tuneline.config.messages import nearest
from tuneline.errors import ConfigError, Problem

LIBRARIES = {"docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}  # process workers are Prefect's own


def run_worker(loaded: Loaded, pool: str) -> NoReturn:
    """Raises ConfigError where the pool, its library or the server is missing."""
    pools = loaded.spec.pools
    if pool not in pools:
        allowed = ", ".join(pools) or "none (the file has no `pools`)"
        raise ConfigError([Problem("", f"found no pool `{pool}`, expected {allowed}", nearest(pool, list(pools)), place="worker")])
    kind = pools[pool].type
    library = LIBRARIES.get(kind)
    if library and importlib.util.find_spec(library.replace("-", "_")) is None:
        found = f"found no {library}, which a {kind} worker needs"
        raise ConfigError([Problem(pool, found, f"`pip install {library}` into the environment of tuneline", place="worker")])
    address = connect(loaded.root / ".tuneline")
    if library and _unknown(address, pool):
        raise ConfigError([Problem(pool, f"found no such pool on the server at {address}", "`tuneline deploy` creates it", place="worker")])
    os.environ |= QUIET
    os.chdir(loaded.root)
    command = worker_command(pool, kind)
    os.execv(command[0], command)


def worker_command(pool: str, kind: str) -> list[str]:
    """A process pool that the server does not know yet is made by its worker; the others have settings, which `deploy` gives them."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", kind, "--name", socket.gethostname()]
    return command if kind == "process" else [*command, "--install-policy", "never", "--no-create-pool-if-not-found"]


def heartbeat(address: str, pool: str) -> str | None:
    """When this machine's worker for a pool last told the server that it lives."""
    try:
        workers = ask(f"{address}/work_pools/{pool}/workers/filter", {})
    except (OSError, ValueError):  # no such pool yet, or no answer this time
        return None
    return next((worker["last_heartbeat_time"] for worker in workers if worker["name"] == socket.gethostname()), None)


def _unknown(address: str, pool: str) -> bool:
    try:
        ask(f"{address}/work_pools/{pool}")
        return False
    except urllib.error.HTTPError as error:
        return error.code == 404  # whether it lets us in is Prefect's to say
