"""`tuneline doctor`: find what would make runs fail or hang, each with the command that fixes it.

This module checks the machine and pipelines.yaml, without importing Prefect. `flows/doctor/server.py` checks the server. Secrets are
reported as set or not set, never shown.
"""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flows.doctor.check import OK, PROBLEM, WARNING, Check
from flows.folders import home_of, server_in, work_in
from flows.machine import gpus_asked, visible_gpus
from flows.server import api, server_state
from flows.server.connect import connect
from tuneline import disk
from tuneline.config.load import Loaded
from tuneline.config.pools import KubernetesPool, ProcessPool
from tuneline.errors import ConfigError, Problem, StoreError
from tuneline.kinds.stage import ProgramStage
from tuneline.paths import resolve_path
from tuneline.workspace.runtimes import find_runtime
from tuneline.workspace.store import Store

SCARCE = 5_000_000_000  # bytes, about a merged model of 1.5B parameters and its quantized copy
PINNED = (
    ("prefect", "tuneline"),
    ("fastapi", "prefect"),
    ("sqlalchemy", "prefect"),
)  # (library, the package whose requirement limits its version)
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "glusterfs", "beegfs", "9p", "virtiofs", "fuse.sshfs", "fuse.glusterfs"}
TAKES_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def examine(loaded: Loaded, fix: bool) -> list[Check]:
    """Run all checks. With `fix`, set the final state on the server of runs whose process is certainly gone."""
    home = home_of(loaded.root)
    found = [Check("python", OK, platform.python_version()), *_versions(), *_runtimes(loaded), *_disks(loaded), _store(loaded)]
    locks = locks_work(home)
    found += [_gpus(loaded), _token(loaded), *_shared(loaded, locks)]
    try:
        address = connect(home)
    except ConfigError as error:
        return [*found, _no_server(loaded, home, error.problems[0])]
    from flows.doctor.server import examine_server

    return [*found, *examine_server(loaded, address, fix and locks)]


def _versions() -> Iterator[Check]:
    try:
        ranges = {name: _allowed(name, by) for name, by in PINNED}
    except PackageNotFoundError:
        yield Check("versions", WARNING, "tuneline is not installed, so nothing says which versions it allows", "pip install .")
        return
    for name, allowed in ranges.items():
        there = version(name)
        if allowed.contains(there):
            yield Check(name, OK, there)
        else:
            yield Check(name, PROBLEM, f"{there} is installed, expected {allowed}", f"pip install '{name}{allowed}'")


def _allowed(name: str, by: str) -> SpecifierSet:
    return next(needed.specifier for needed in map(Requirement, requires(by) or ()) if needed.name == name)


def _runtimes(loaded: Loaded) -> Iterator[Check]:
    stages = [s for pipeline in loaded.spec.pipelines.values() for s in pipeline.stages.values() if isinstance(s, ProgramStage)]
    programs = {stage.runtime for stage in stages}
    for name in sorted({name for stage in stages for name in stage.runtimes()}):
        check = f"runtime {name}"
        try:
            runtime = find_runtime(name, loaded.spec, loaded.root)
        except ConfigError as error:
            yield Check(check, PROBLEM, error.problems[0].message, error.problems[0].hint)
            continue
        if runtime.ready:
            yield Check(check, OK, str(runtime.python))
        else:
            assert runtime.folder is not None
            older = any(runtime.folder.parent.glob(f"{name}-{'[0-9a-f]' * 12}"))
            message = "its lock has changed since it was set up" if older else "it is not set up"
            # vLLM runtimes are set up only by name: a file may hold pipelines that this machine never runs.
            yield Check(check, PROBLEM if name in programs else WARNING, message, f"tuneline setup {name}")


def _disks(loaded: Loaded) -> Iterator[Check]:
    for name, folder in (("store", resolve_path(loaded.root, loaded.spec.store)), ("work", work_in(home_of(loaded.root)))):
        free = disk.free(folder)
        status = PROBLEM if free < disk.ROOM else WARNING if free < SCARCE else OK
        yield Check(f"disk of {name}", status, f"{disk.human(free)} are free for {folder}", "" if status == OK else "tuneline gc")


def _store(loaded: Loaded) -> Check:
    root = resolve_path(loaded.root, loaded.spec.store)
    try:
        Store(root).check()
    except StoreError as error:
        return Check("store", PROBLEM, error.message, error.hint)
    there = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Check("store", PROBLEM, f"{there} cannot be written", f"chmod u+w {there}, or name another `store:`")
    if not root.exists() and not root.is_relative_to(home_of(loaded.root)) and not root.parent.is_dir():
        return Check("store", PROBLEM, f"there is no folder {root.parent}", f"mkdir {root.parent}, or mount its disk")
    return Check("store", OK, f"{root} can be written" if root.exists() else f"the first run creates {root}")


def _gpus(loaded: Loaded) -> Check:
    wanting, there = gpus_asked(loaded), len(visible_gpus())
    most = max((gpus for _, gpus, _ in wanting), default=0)
    message = f"{there} seen, stages ask for up to {most}"
    if most <= there:
        return Check("gpus", OK, message)
    stage, _, pool = next(each for each in wanting if each[1] > there)
    if pool is None:
        return Check("gpus", WARNING, f"{message} ({stage})", "give it a `pool:` with GPUs, or run it on a machine that has as many")
    hint = f"`local: false` for the pool {pool}, and `tuneline worker {pool}` where the GPUs are"
    return Check("gpus", WARNING, f"{message} ({stage}, in the pool {pool} of this machine)", hint)


def _token(loaded: Loaded) -> Check:
    if os.environ.get("HF_TOKEN"):
        return Check("HF_TOKEN", OK, "it is set")
    if any(list(stage.repositories()) for pipeline in loaded.spec.pipelines.values() for stage in pipeline.stages.values()):
        return Check("HF_TOKEN", WARNING, "it is not set: only public repositories of the hub can be read", "export HF_TOKEN=...")
    return Check("HF_TOKEN", OK, "it is not set, and nothing comes from the hub")


def _shared(loaded: Loaded, locks: bool) -> Iterator[Check]:
    """Check locks and shared folders: other machines can reuse artifacts and checkpoints only if they see the same folder."""
    home = home_of(loaded.root)
    if locks:
        yield Check("locks", OK, f"flock works in {home}")
    else:
        message = f"flock does not work in {home}: two runs could build the same artifact at once"
        yield Check("locks", PROBLEM, message, "move the project to another file system; of NFS, version 4")
    pools = loaded.spec.pools.items()
    apart = [name for name, pool in pools if isinstance(pool, KubernetesPool) or (isinstance(pool, ProcessPool) and not pool.local)]
    for name, folder in (("store", resolve_path(loaded.root, loaded.spec.store)), ("work", work_in(home))) if apart else ():
        kind, hint = file_system(folder), "move the project, with .tuneline/, to a folder that they mount at the same path"
        if kind in NETWORK:
            yield Check(f"shared {name}", OK, f"{folder} is shared ({kind})")
        else:
            message = f"{folder} is on a disk of this machine ({kind}), but other machines work for {', '.join(apart)}"
            yield Check(f"shared {name}", WARNING, message, hint)
    state = server_state.read(server_in(home))
    if state and state.database is None and file_system(server_in(home)) in NETWORK:
        message = "the server's SQLite file is on a network file system, which can damage it"
        yield Check("database", PROBLEM, message, "tuneline down, then tuneline up --database postgresql+asyncpg://...")


def locks_work(home: Path) -> bool:
    """Return whether one process's flock in the folder keeps another process out."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=home, prefix=".lock-") as file:
            take = [sys.executable, "-I", "-S", "-c", TAKES_LOCK, file.name]
            fcntl.flock(file, fcntl.LOCK_EX)
            kept_out = subprocess.run(take, stderr=subprocess.DEVNULL).returncode != 0
            fcntl.flock(file, fcntl.LOCK_UN)
            return kept_out and subprocess.run(take, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on, or will be on once it exists."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()).resolve()
    found, longest = "unknown", 0
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, at, kind = line.split()[:3]
        mount = Path(at.replace("\\040", " "))
        if there.is_relative_to(mount) and len(mount.parts) >= longest:
            found, longest = kind, len(mount.parts)
    return found


def _no_server(loaded: Loaded, home: Path, problem: Problem) -> Check:
    if api.setting(api.URL):
        return Check("server", PROBLEM, problem.message, problem.hint)
    folder = server_in(home)
    if state := server_state.read(folder):
        if (origin := server_state.origin_of(folder, state)) != folder.resolve():
            message = f"`up` started it when this folder was {origin.parent.parent}: it writes there"
            return Check("server", PROBLEM, message, "tuneline up, which ends it and starts another")
        return Check("server", PROBLEM, "the server that `up` started has ended", "tuneline up")
    if loaded.spec.pools:
        return Check(
            "server", WARNING, f"no server is running, so no worker serves the pools ({', '.join(loaded.spec.pools)})", "tuneline up"
        )
    return Check("server", OK, "no server is running; each run starts its own, without history and UI", "tuneline up")
