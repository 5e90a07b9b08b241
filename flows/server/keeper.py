"""Keep the workers of `tuneline up` running: restart one that died, and start one for a pool that was added to the file. Report the end of
runs that could not report it themselves.

A separate process, which `up` starts and `down` ends. It ends no worker: a pool may leave the file for a moment while somebody edits it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from flows.server import server_state, workers
from flows.server.connect import answers, loopback_without_proxy
from flows.server.unreported import Unreported
from tuneline.config.load import Loaded, load
from tuneline.errors import ConfigError, StageFailed
from tuneline.paths import PACKAGES_ROOT
from tuneline.workspace.runs import Runs

ROLE = "keeper"
POLL_SECONDS = 2.0
AGAIN_SECONDS = 60.0  # before a worker that did not start is retried


def start(loaded: Loaded, folder: Path, state: server_state.State) -> server_state.Process:
    code = f"import sys; sys.path.insert(0, {str(PACKAGES_ROOT)!r}); from flows.server import keeper; keeper.main()"
    command = [sys.executable, "-P", "-c", code, str(loaded.file)]
    return server_state.process(workers.spawn(command, folder, ROLE, state.address, folder / "keeper.log", {}).pid)


def main() -> None:
    from flows.server.up import end_all

    file, folder = Path(sys.argv[1]), Path(os.environ[server_state.UP])
    loaded, seen, unreported = None, None, Unreported(Runs(folder.parent / "runs"))
    loopback_without_proxy()
    if not _gone(folder):
        with server_state.alone(folder):
            pass  # wait until `up` has written the keeper's process id
    last = server_state.read(Path())
    while state := _its_state(folder):
        last = state
        with suppress(OSError, ConfigError):  # moved, or being edited: keep the previous pools
            if (now := file.stat().st_mtime_ns) != seen:
                seen = now
                loaded = load(file)
        try:
            os.environ |= server_state.password(folder)
            unreported.look(state.address, _say)
            if loaded is not None:
                _tend(loaded, folder)
            time.sleep(POLL_SECONDS)
        except (StageFailed, OSError) as error:  # such as a full disk: the keeper must outlive it
            _say(str(error))
            time.sleep(AGAIN_SECONDS)
    if last and _gone(folder):
        _say(f"{folder} is gone: the project was moved or deleted; ending the server and the workers, which would write there")
        end_all(folder, last, moved=True)


def _gone(folder: Path) -> bool:
    """Return whether the folder was moved or deleted. The working directory of this process follows a move."""
    return not folder.exists() or folder.stat().st_ino != Path().stat().st_ino


def _tend(loaded: Loaded, folder: Path) -> None:
    """Start the missing workers if the server answers."""
    state = _its_state(folder)
    if state is None or not workers.missing(loaded, state):
        return
    with server_state.alone(folder):  # `up` or `down` may have changed the state meanwhile
        state = _its_state(folder)
        if state and answers(state.address):
            workers.start(loaded, folder, state, _say)


def _its_state(folder: Path) -> server_state.State | None:
    """Return the state, or None once this process is no longer its keeper."""
    state = server_state.read(folder)
    return state if state and state.keeper and state.keeper.pid == os.getpid() else None


def _say(message: str) -> None:
    with suppress(OSError):  # the log's disk may be the full one; what could not be written is written with the next line
        print(time.strftime("%Y-%m-%d %H:%M:%S"), message, flush=True)
