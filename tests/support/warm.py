"""A parent that has imported what the programs import, and forks one for each start: 1 CPU second in place of 7 to 10.

    python tests/support/warm.py serve SOCKET [MODULE...]      until its stdin closes
    python tests/support/warm.py start ARGV...                 as `python ARGV...`, by the parent that WARM_SOCKET names

A request is Python's arguments (`-m MODULE ...`), environment, folder and three descriptors. The child takes them over and runs the
module as __main__. The answer is its process id, later its status; if whoever asked goes away before, the program and its descendants
are killed. Ranks are forked by the launcher, in place of torch's `SubprocessHandler._popen`.

What a fork hides: a module that a program forgot to import; what a library says or reads from the environment while it is imported
(OMP_*, HF_*, CUDA_VISIBLE_DEVICES, PYTHONHASHSEED: they are the parent's). So each kind and strategy starts as a real process once, and
all do with WARM=0. Programs that need a package of ABSENT become a real process by exec. To the outside a child has the parent's command line and environment in /proc. It is no
descendant of whoever asked: a watchdog does not see it, so `start` passes signals on to it. Kills of whole trees, orphans, and searches
in /proc need real processes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "tests" / "support" / "patches"
PROGRAMS = (
    "tasks.launch", "tasks.checkpoints", "tasks.dataset", "tasks.evaluation", "tasks.grpo", "tasks.grpo_trainer", "tasks.harness", "tasks.merge",
    "tasks.model", "tasks.rollouts", "tasks.sequences", "tasks.sft", "tasks.sft_trainer", "tasks.strategies", "tasks.universal",
    "accelerate", "datasets", "deepspeed", "matplotlib.figure", "transformers.models.llama.modeling_llama", "torch.distributed.launcher.api",
    "torch.distributed.elastic.multiprocessing", "torch.distributed.fsdp",
)  # fmt: skip
ABSENT = ("bitsandbytes",)  # libraries import them wherever they are installed, used or not
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# --- who asks ---------------------------------------------------------------------------------------------------------


class Program:
    """A program that the parent has forked; as much of subprocess.Popen as tests use."""

    def __init__(self, address: str, argv: Sequence[str], folder: Path, environment: Mapping[str, str], files: Sequence[int]):
        self.args, self.returncode = argv, None  # type: ignore[var-annotated]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        socket.send_fds(self._socket, [b"\n"], files)
        request = {"argv": list(argv), "folder": str(folder), "environment": dict(environment)}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._socket.makefile("rb")
        self.pid = int(self._answer()["pid"])

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the warm parent has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Status of the program, -n if signal n ended it."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._socket, selectors.EVENT_READ)
                if not ready.select(timeout):
                    raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            self.returncode = int(self._answer()["status"])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start(
    argv: Sequence[str], folder: Path, environment: Mapping[str, str], out: IO[Any], error: IO[Any], real: bool = False
) -> Program | subprocess.Popen[bytes]:
    """Starts `python ARGV...` in a folder: forked, or as a real process."""
    if real or os.environ.get("WARM") == "0":
        return subprocess.Popen([sys.executable, *argv], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error)
    with open(os.devnull, "rb") as nothing:
        return Program(parent(sys.executable), argv, folder, environment, [nothing.fileno(), out.fileno(), error.fileno()])


@functools.cache
def parent(python: str, *modules: str) -> str:
    """Starts the parent, which lives as long as this process, under a Python; returns its address."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = os.path.join(folder.name, "socket")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of the allocator that Arrow brings along
    }  # fmt: skip
    command = [python, str(Path(__file__)), "serve", address, *(modules or PROGRAMS)]
    process = subprocess.Popen(command, cwd=folder.name, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"listening\n"  # it imports after that; who asks before it is done waits

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    return address


def stand_for(argv: list[str]) -> int:
    """Has the parent run a program, as if this process were it."""
    program = Program(os.environ["WARM_SOCKET"], argv, Path.cwd(), os.environ, [0, 1, 2])

    def pass_on(number: int, frame: object) -> None:
        for pid in (program.pid, *descendants(program.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    status = program.wait()
    if status < 0:
        if -status in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


# --- the parent -------------------------------------------------------------------------------------------------------


def serve(address: str, modules: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("listening", flush=True)
    import_all(modules)
    deaths, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    programs: dict[int, socket.socket] = {}
    ready = selectors.DefaultSelector()
    for source in (listener, sys.stdin, deaths):
        ready.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj is sys.stdin:
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
            else:  # who asked went away
                asker = key.fileobj  # type: ignore[assignment]
                ready.unregister(asker)
                pid = next(pid for pid, other in programs.items() if other is asker)
                del programs[pid]
                kill([*descendants(pid), pid])
                asker.close()


def import_all(modules: list[str]) -> None:
    import importlib

    sys.path.insert(0, str(ROOT))
    from tasks.noise import silence

    silence()
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in modules:
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


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """From the kernel: no library, so that `start` stays quick."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


# --- the child --------------------------------------------------------------------------------------------------------


def run_as_child(files: Sequence[int], request: dict[str, Any]) -> None:
    """Becomes the program, and never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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
        import traceback

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

        SubprocessHandler._popen = lambda self, args, env: Rank(args, env)  # type: ignore[assignment,return-value]
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
    from tasks.gptq import quantization
    from tasks.loading import model_folder

    content = json.loads(request.read_bytes())
    models = [given["path"] for given in content["inputs"].values() if given["type"] == "Model"]
    bases = [given["base"]["path"] for given in content["inputs"].values() if given.get("base")]
    return content["config"].get("method") == "qlora" or any(quantization(model_folder(Path(path))) for path in (*models, *bases))


class Rank(subprocess.Popen):  # type: ignore[type-arg]
    """A rank, forked by the launcher."""

    def __init__(self, args: Sequence[str], environment: Mapping[str, str]):
        self.args, self.returncode, self.stdin, self.stdout, self.stderr = args, None, None, None, None
        self._child_created, self._waitpid_lock, self._sigint_wait_secs = True, threading.Lock(), 0.25
        self.pid = os.fork()
        if self.pid == 0:
            run_as_child((), {"argv": args[1:], "folder": os.getcwd(), "environment": environment})


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "serve":
        serve(rest[0], rest[1:])
    else:
        sys.exit(stand_for(rest))
