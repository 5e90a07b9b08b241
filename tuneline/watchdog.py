"""Runs a program for a flow, or an engine for a program, and ends all its descendants when the parent stops or dies.

    python -I -S watchdog.py ARGV...

Uses only the standard library: it must start in milliseconds and never fail. Its stdin is a pipe that the parent holds open.
When a byte arrives (cancel, timeout) or the pipe closes (the parent was killed), it ends every descendant: SIGTERM, a grace
period, SIGKILL. If the pipe closes after the byte, SIGKILL follows at once.
As a child subreaper it inherits orphaned grandchildren, so none escapes by losing its parent.
It ignores signals of the terminal's group: the flow decides. Exits with the program's exit status, 128 + n for signal n.
"""

import contextlib
import ctypes
import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE = float(os.environ.get("TUNELINE_GRACE", "3"))


def descendants(root: int) -> list[int]:
    """Return the process ids below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.append(child)
            waiting.append(child)
    return found


def signal_all(number: int) -> bool:
    """Send a signal to every descendant; return False if there was none."""
    found = descendants(os.getpid())
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
    return bool(found)


def reap(program: int) -> int | None:
    """Reap dead descendants; return the program's status if it is among them."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == program:
            status = os.waitstatus_to_exitcode(raw)


asked = False  # whether a byte on stdin has asked us to stop


def heard() -> bytes | None:
    """Read stdin without waiting: None if there is nothing, b"" once it is closed."""
    global asked
    if not select.select([0], [], [], 0)[0]:
        return None
    byte = os.read(0, 1)
    asked = asked or bool(byte)
    return byte


def anyone() -> bool:
    """Return whether a child is left, including unreaped ones. Without one there is no descendant: orphans become our children.
    Reading /proc would miss a process that is read just before its parent dies, and whose parent is read after."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        return False


def end_descendants(program: int) -> int | None:
    """Send SIGTERM, then SIGKILL after the grace period, until no child is left; return the program's status if it was running."""
    status, deadline = None, time.monotonic() + GRACE
    signal_all(signal.SIGTERM)
    while anyone():
        status = reap(program) if status is None else (reap(program), status)[1]
        if (heard() == b"" and asked) or time.monotonic() > deadline:
            signal_all(signal.SIGKILL)
        time.sleep(0.05)
    last = reap(program)
    return last if status is None else status


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    deaths, wakeup = os.pipe()  # receives a byte with each death of a child
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    # Keep a reference: a deleted Popen reaps its child, and we would wait for its status forever.
    # The child inherits the key's lock as well, in case we are killed.
    prepare = functools.partial(prepare_program, os.getpid())
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare, close_fds=False)
    program, status = process.pid, None
    while status is None:
        if deaths in select.select([0, deaths], [], [])[0]:
            os.read(deaths, 4096)
        if heard() is not None:
            status = end_descendants(program)
            break
        status = reap(program)
    end_descendants(program)  # descendants that the program left behind
    if folder := os.environ.get("TUNELINE_LEFT_TO_WATCHDOG"):  # a folder that the program would have removed at its end
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(143 if status is None else 128 - status if status < 0 else status)


def prepare_program(watchdog: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != watchdog:  # the watchdog was killed before that call: no signal will come
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
