"""The parent of the tests' programs (see warm.py): imports what they import, then forks one for each request.

    python tests/support/warm_parent.py SOCKET      until its stdin closes

A request is Python's arguments (`-m MODULE ...`), environment, folder and three descriptors. The child takes them over and runs the
module as __main__. The answer is its process id, later its status. A program that needs a package of ABSENT becomes a real process by
exec. A launcher has threads by the time it starts its ranks, and a lock that one of them holds would be held for ever in a fork: so, before
its first thread, it forks a zygote, which serves as the parent does and forks the ranks, in place of torch's `SubprocessHandler._popen`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
from warm import PATCHES, ZYGOTE, Program, descendants, kill

sys.path.pop(0)
MODULES = (
    "tasks.launch", "tasks.training.checkpoints", "tasks.data.dataset", "tasks.evaluation.evaluate", "tasks.training.grpo", "tasks.training.grpo_trainer", "tasks.evaluation.harness", "tasks.convert.merge",
    "tasks.models.fetch", "tasks.training.rollouts", "tasks.training.sequences", "tasks.training.sft", "tasks.training.sft_trainer", "tasks.training.strategies", "tasks.training.deepspeed_checkpoints",
    "accelerate", "datasets", "deepspeed", "matplotlib.figure", "transformers.models.llama.modeling_llama", "torch.distributed.launcher.api",
    "torch.distributed.elastic.multiprocessing", "torch.distributed.fsdp",
)  # fmt: skip
ABSENT = ("bitsandbytes",)  # libraries import it wherever it is installed, used or not
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36


def listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    return listener


def serve(listener: socket.socket, lifeline: int) -> None:
    """Until the other end of `lifeline` is closed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    deaths, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    programs: dict[int, socket.socket] = {}
    ready = selectors.DefaultSelector()
    for source in (listener, lifeline, deaths):
        ready.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj == lifeline:
                kill(descendants(os.getpid()))
                return
            if key.fileobj == deaths:
                os.read(deaths, 4096)
                for pid, status in ended():
                    if asker := programs.pop(pid, None):
                        ready.unregister(asker)
                        answer(asker, status=status)
                        asker.close()
            elif key.fileobj is listener:
                asker, _ = listener.accept()
                if pid := accept(asker):
                    programs[pid] = asker
                    ready.register(asker, selectors.EVENT_READ)
            elif pid := next((pid for pid, asker in programs.items() if asker is key.fileobj), None):  # who asked went away
                asker = programs.pop(pid)
                ready.unregister(asker)
                asker.close()
                kill([*descendants(pid), pid])


def import_all() -> None:
    from tasks.log_filters import silence

    silence()
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def accept(asker: socket.socket) -> int | None:
    """Forks a program; its process id. None if there are threads, whose locks a child would wait for in vain."""
    _, files, _, _ = socket.recv_fds(asker, 1, 3)
    with asker.makefile("rb") as stream:
        request = json.loads(stream.readline())
    if len(os.listdir("/proc/self/task")) > 1:
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        answer(asker, error=f"the warm parent has threads: {', '.join(names)}")
        asker.close()
        return None
    pid = os.fork()
    if pid == 0:
        run_as_child(files, request)
    for file in files:
        os.close(file)
    answer(asker, pid=pid)
    return pid


def answer(asker: socket.socket, **said: Any) -> None:
    with contextlib.suppress(OSError):
        asker.sendall(json.dumps(said).encode() + b"\n")


def ended() -> list[tuple[int, int]]:
    """(process id, status) of children that have ended, orphans of programs among them."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (got := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((got[0], os.waitstatus_to_exitcode(got[1])))
    return found


# --- the child --------------------------------------------------------------------------------------------------------


def run_as_child(files: Sequence[int], request: dict[str, Any]) -> None:
    """Becomes the program, and never returns."""
    status = 1
    try:
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_NAME, b"python", 0, 0, 0)
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 1024)
        status = become(request["argv"], request["folder"], request["environment"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def become(argv: list[str], folder: str, environment: Mapping[str, str]) -> int:
    """Runs `python ARGV...` in this process; its status."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    module = argv.index("-m") + 1
    if needs_absent(Path(argv[module + 1])):
        os.execv(sys.executable, [sys.executable, *argv])
    tempfile.tempdir = None
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if modules := sys.modules.get("transformers.dynamic_module_utils"):
        modules.HF_MODULES_CACHE = environment.get("HF_MODULES_CACHE", modules.HF_MODULES_CACHE)
    sys.path[:0] = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]
    if str(PATCHES) in sys.path:
        runpy.run_path(str(PATCHES / "sitecustomize.py"))
    if argv[module] == "tasks.launch":
        from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

        ranks = zygote()
        close = SubprocessHandler.close

        def close_if_there(self: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
            with contextlib.suppress(ProcessLookupError):  # the zygote has collected it meanwhile; of a child of its own there is a zombie
                close(self, death_sig)

        SubprocessHandler.close = close_if_there  # type: ignore[method-assign]
        SubprocessHandler._popen = lambda self, args, env: Rank(ranks, args[1:], Path.cwd(), env, [0, 1, 2])  # type: ignore[assignment,return-value]
    sys.modules.pop(argv[module], None)  # runpy warns of a module that is there already
    sys.argv = ["", *argv[module + 1 :]]
    try:
        runpy.run_module(argv[module], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            print(left.code, file=sys.stderr)
            return 1
        return left.code or 0
    return 0


def needs_absent(request: Path) -> bool:
    """Whether the program imports what the parent must not."""
    from tasks.models.gptq import quantization
    from tasks.models.loading import model_folder

    content = json.loads(request.read_bytes())
    models = [given["path"] for given in content["inputs"].values() if given["type"] == "Model"]
    bases = [given["base"]["path"] for given in content["inputs"].values() if given.get("base")]
    return content["config"].get("method") == "qlora" or any(quantization(model_folder(Path(path))) for path in (*models, *bases))


def zygote() -> str:
    """Forks one, which ends with this process; returns its address."""
    address = f"\0ranks-{os.getpid()}"
    listener, (lifeline, held) = listen(address), os.pipe()
    if os.fork() == 0:
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_NAME, ZYGOTE.encode(), 0, 0, 0)
        os.close(held)
        serve(listener, lifeline)
        os._exit(0)
    listener.close()
    os.close(lifeline)
    return address


class Rank(Program):
    """What torch's launcher asks of a rank."""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


if __name__ == "__main__":
    parent = listen(sys.argv[1])
    print("listening", flush=True)
    import_all()
    serve(parent, sys.stdin.fileno())
