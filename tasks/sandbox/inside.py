"""Makes the sandbox of `tasks.sandbox.run`, runs one piece of Python in it, and reports the outcome.

    python -s -P tasks/sandbox/inside.py < REQUEST > ANSWER        (both JSON; standard library only, no imports of ours)

    launcher      new user, pid, mount, network, IPC and host-name namespaces; a root folder of read-only mounts; chroot
    └── init      process 1 of the pid namespace: when it ends, the kernel kills every process in it, of whatever session
        └── code  no capabilities, no user that owns anything, limits; runs the code

The root folder holds the interpreter's own folders, /usr and the system's libraries, all read-only, and an empty /tmp of
bounded size in memory. There is no /proc, /sys or home. A root that is not the system's also prevents further user namespaces.

The code counts as passed only if a random word is reported, which is drawn after the code was handed over and written after its
last line: code that exits early, or prints anything, has not passed. Code that searches the interpreter's own frames can find the
word; tests and tested code share a process, as HumanEval requires.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import traceback

TYPE_CHECKING = False  # importing typing would take 3 ms for each piece
if TYPE_CHECKING:
    from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534  # runs the code if root starts the sandbox: RLIMIT_NPROC does not apply to user 0
ROOT = "/sys"  # a folder that exists everywhere and that the code does not need; covered only in the sandbox's mount namespace
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
TAIL = 2000  # bytes of stderr kept
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    request, by_root = json.load(sys.stdin), os.getuid() == 0
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        write("/proc/self/oom_score_adj", "1000")  # the kernel kills it first if the machine runs out of memory
        unshare()
        make_root(request["folders"], request["limits"]["folder_bytes"])
    except OSError as error:
        answer("refused", str(error))
        return
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    init = os.fork()
    if init == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # prevents the code from tracing this process
        answer(*supervise(request["code"], request["limits"], by_root))
        os._exit(0)
    os.waitpid(init, 0)


def answer(outcome: str, detail: str) -> None:
    os.write(1, json.dumps({"outcome": outcome, "detail": detail}).encode())


def call(what: str, *arguments: Any) -> None:
    if getattr(libc, what)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# --- namespaces -------------------------------------------------------------------------------------------------------


def unshare() -> None:
    """Enter new namespaces. A process outside them writes the user mapping: only root may map a second user."""
    users, me, group = [f"0 {os.getuid()} 1"], os.getpid(), os.getgid()
    groups = [f"0 {group} 1"]
    if os.getuid() == 0:
        users, groups = [*users, f"{NOBODY} {NOBODY} 1"], [*groups, f"{NOBODY} {NOBODY} 1"]
    unshared, go = os.pipe()
    outside = os.fork()
    if outside == 0:
        os.close(go)
        os.read(unshared, 1)
        try:
            if os.getuid() != 0:
                write(f"/proc/{me}/setgroups", "deny")
            write(f"/proc/{me}/uid_map", "\n".join(users))
            write(f"/proc/{me}/gid_map", "\n".join(groups))
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    try:
        call("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    finally:
        os.close(unshared)
        os.close(go)
        failed = os.waitstatus_to_exitcode(os.waitpid(outside, 0)[1])
    if failed:
        raise OSError(failed, f"uid_map: {os.strerror(failed)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def make_root(folders: list[str], size: int) -> None:
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    tmpfs(ROOT, "mode=755")
    os.mkdir(ROOT + "/tmp")
    tmpfs(ROOT + "/tmp", f"size={size},nr_inodes=4096,mode=1777")  # first: an interpreter may lie below /tmp
    for path in (*SYSTEM, *folders):
        if os.path.islink(path):
            link(path)
        elif os.path.exists(path) and not os.path.exists(ROOT + path):
            bind(path)
            read_only(ROOT + path)
    for path in DEVICES:
        bind(path)
    read_only(ROOT, 0)
    os.chroot(ROOT)
    os.chdir("/tmp")


def tmpfs(path: str, options: str) -> None:
    call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())


def link(path: str) -> None:
    os.makedirs(os.path.dirname(ROOT + path), exist_ok=True)
    os.symlink(os.readlink(path), ROOT + path)


def bind(path: str) -> None:
    os.makedirs(os.path.dirname(ROOT + path), exist_ok=True)
    if os.path.isdir(path):
        os.mkdir(ROOT + path)
    else:
        os.close(os.open(ROOT + path, os.O_CREAT))
    call("mount", path.encode(), (ROOT + path).encode(), None, MS_BIND | MS_REC, None)


def read_only(path: str, flags: int = AT_RECURSIVE) -> None:
    """Make a mount read-only, by default with all mounts below it. An unprivileged remount would have to repeat every flag."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes))


# --- process 1 --------------------------------------------------------------------------------------------------------


def supervise(code: str, limits: dict[str, Any], by_root: bool) -> tuple[str, str]:
    """Run the code in a child process. Return the outcome and the end of its stderr."""
    word = os.urandom(16)
    said_end, say_end = os.pipe()
    error_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        run(code, limits, by_root, word, say_end, write_end)
    os.close(say_end)
    os.close(write_end)
    ended = os.pidfd_open(process)
    deadline = time.monotonic() + limits["seconds"]
    said, tail, waiting = b"", b"", {said_end, error_end, ended}
    while ended in waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            return "timed out", f"{limits['seconds']} seconds"
        readable, _, _ = select.select(list(waiting), [], [], left)
        for end in readable:
            chunk = b"" if end == ended else os.read(end, 65536)
            if not chunk:
                waiting.discard(end)
            elif end == error_end:
                tail = (tail + chunk)[-TAIL:]
            else:
                said = (said + chunk)[:1000]
    for end in waiting:  # read the rest; a remaining process may hold the pipe open
        os.set_blocking(end, False)
        try:
            while chunk := os.read(end, 65536):
                said, tail = (said, (tail + chunk)[-TAIL:]) if end == error_end else ((said + chunk)[:1000], tail)
        except BlockingIOError:
            pass
    _, raw, usage = os.wait4(process, 0)
    status, text = os.waitstatus_to_exitcode(raw), tail.decode(errors="replace")
    if status == 0 and said == word:
        return "passed", text
    if status == -signal.SIGXCPU or (status < 0 and usage.ru_utime + usage.ru_stime >= limits["cpu_seconds"]):
        return "timed out", f"{limits['cpu_seconds']} seconds of CPU time"
    if said == b"memory":
        return "out of memory", f"{limits['memory_bytes']} bytes"
    if status < 0:
        return "killed", f"signal {-status}\n{text}"
    return "failed", text if said == b"raised" else f"ended before its last line\n{text}"


# --- the code ---------------------------------------------------------------------------------------------------------


def run(code: str, limits: dict[str, Any], by_root: bool, word: bytes, say: int, write_end: int) -> NoReturn:
    """Run the code and exit: never returns."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for source, target in ((null, 0), (null, 1), (write_end, 2)):
        os.dup2(source, target)
    kept = os.dup2(say, 100)
    os.closerange(3, kept)
    os.closerange(kept + 1, 1024)
    drop_privileges(by_root)
    for what, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_NOFILE, 256, 256),
    ):
        resource.setrlimit(what, (soft, hard))
    sys.argv, sys.stdin = [""], open(os.devnull)  # noqa: SIM115  (until the process ends)
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except MemoryError:
        os.write(kept, b"memory")
    except BaseException as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        traceback.print_exception(error)
        os.write(kept, b"raised")
    else:
        os.write(kept, word)
        os._exit(0)
    os._exit(1)


def drop_privileges(by_root: bool) -> None:
    """Drop all capabilities, also for after an exec; if root started the sandbox, change to another user."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if by_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


if __name__ == "__main__":
    main()
