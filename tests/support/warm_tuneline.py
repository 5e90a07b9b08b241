"""`tuneline` from a parent that has imported everything: what a test starts is a fork of it, in a tenth of the time of a new process.

A fork has its own folder, environment, signals and descriptors, and reads Prefect's settings where a new process would: at the first
import of Prefect. It hides what is forgotten or done while modules are imported; so tests of that, and some of each command, are marked
`process` and start real ones, and with WARM=0 all do.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


# --- the test's side ----------------------------------------------------------------------------------------------------


class Warm(subprocess.Popen[str]):
    """A forked `tuneline`, to its user a process like any other. Overridden is how it is started and how its end is known."""

    parent: subprocess.Popen[bytes] | None = None
    control: socket.socket
    seconds = 0.0
    """CPU time of those that have ended: the parent's children are not ours."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        cwd, environment, ends = rest[4], rest[5], rest[9:15]  # ends: of stdin, stdout and stderr, each to read and to write
        if Warm.parent is None:
            Warm.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(theirs.fileno())]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            Warm.parent = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            atexit.register(end)
        self._status, theirs_too = os.pipe()
        request = json.dumps({"arguments": args, "folder": str(cwd), "environment": environment}).encode()
        socket.send_fds(Warm.control, [request], [ends[3], ends[5], theirs_too])
        for descriptor in (ends[3], ends[5], theirs_too):
            os.close(descriptor)
        self._child_created, self._lines = True, os.fdopen(self._status, "r")
        self.pid = int(self._lines.readline())

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags == os.WNOHANG and not select.select([self._lines], [], [], 0)[0]:
            return 0, 0
        status, seconds = self._lines.readline().split()
        self._lines.close()
        Warm.seconds += float(seconds)
        return self.pid, int(status)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None and not self._lines.closed and (status := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(status[1])
        return self.returncode


def end() -> None:
    Warm.control.close()
    assert Warm.parent is not None
    Warm.parent.wait()


# --- the parent's -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Serves until its tests have ended."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    lazy = imported()
    gc.collect()
    gc.freeze()
    children: dict[int, tuple[int, int]] = {}
    while True:
        ready, _, _ = select.select([control, *children], [], [])
        for ended in children.keys() & set(ready):
            pid, status_end = children.pop(ended)
            _, status, usage = os.wait4(pid, 0)
            os.write(status_end, f"{status} {usage.ru_utime + usage.ru_stime}\n".encode())
            os.close(status_end)
            os.close(ended)
        if control in ready:
            request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not request:
                return
            assert len(os.listdir("/proc/self/task")) == 1, "something that is imported has started a thread: it would be missing in a fork"
            pid = os.fork()
            if not pid:
                control.close()
                for known in [descriptors[2], *children, *(end for _, end in children.values())]:
                    os.close(known)
                become(json.loads(request), descriptors[:2], lazy)
            os.write(descriptors[2], f"{pid}\n".encode())
            children[os.pidfd_open(pid)] = pid, descriptors[2]
            for descriptor in descriptors[:2]:
                os.close(descriptor)


def become(request: Any, outputs: list[int], lazy: set[str]) -> None:
    """The process that `python -m flows` would be; does not return."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate(outputs, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(request["folder"])
        sys.path[0], sys.argv = request["folder"], ["tuneline", *request["arguments"][3:]]
        os.environ.clear()
        os.environ.update(request["environment"])
        read_settings_at_import(lazy)
        from flows.__main__ import main as tuneline

        tuneline()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def imported() -> set[str]:
    """Imports all of `flows`, and what Prefect imports late. Returns the modules that need Prefect."""
    importer, needs = builtins.__import__, dict[str, set[str]]()

    def noted(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        needs.setdefault((globals or {}).get("__name__", ""), set()).update({name, *(f"{name}.{each}" for each in fromlist or ())})
        return importer(name, globals, locals, fromlist, level)

    builtins.__import__ = noted
    for file in sorted((ROOT / "flows").rglob("*.py")):
        if file.stem not in ("__init__", "__main__"):
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    builtins.__import__ = importer
    lazy = {"prefect"}
    while more := {name for name, others in needs.items() if name.startswith("flows.") and others & lazy} - lazy:
        lazy |= more
    return lazy


def read_settings_at_import(lazy: set[str]) -> None:
    """As a process does that has not imported Prefect yet."""
    importer = builtins.__import__

    def first(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        if name.partition(".")[0] == "prefect" or not lazy.isdisjoint({name, *(f"{name}.{each}" for each in fromlist or ())}):
            builtins.__import__ = importer
            from prefect.context import refresh_global_settings_context
            from prefect.logging.configuration import setup_logging

            refresh_global_settings_context()
            setup_logging()
        return importer(name, globals, locals, fromlist, level)

    builtins.__import__ = first


if __name__ == "__main__":
    main()
