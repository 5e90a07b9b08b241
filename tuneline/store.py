"""The store: finished artifacts, found by key, published whole or not at all.

    <store>/<kind>/<key[:2]>/<key>/{payload/, meta/, manifest.json}      an artifact: complete, because the manifest is there
    <store>/.building/<key>/                                            being written, under the key's lock
    <store>/.quarantine/                                                found broken; kept for a look, never used
    <store>/.locks/<key>                                                an flock, which the kernel frees when its holder dies

An artifact enters by one rename after everything is on disk, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from tuneline.errors import StageFailed, StoreError

SCHEMA = 1
CHANGED = "has changed since it was written"
POLL = 0.2  # seconds between two tries to take a lock


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: int
    sha256: str


class Base(BaseModel):
    """The Model that an Adapter was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    key: str
    digest: str
    template: str | None


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and what came out. Only `files` decide the digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")
    kind: str
    type: Literal["Model", "Adapter", "Dataset", "Report"]
    key: str
    document: dict[str, Any]
    """What the key is the hash of."""
    digest: str
    files: tuple[File, ...]
    parents: dict[str, str]
    """By input slot: the upstream artifact as `kind/key`."""
    base: Base | None = None
    template: str | None = None
    """sha256 of the chat template saved with it."""
    metrics: dict[str, FiniteFloat]
    info: dict[str, Any]
    host: dict[str, Any]
    """Facts of the machine and the times; in no key and no digest."""

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: Manifest

    @property
    def payload(self) -> Path:
        return self.path / "payload"

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def digest(self) -> str:
        return self.manifest.digest


class Store:
    def __init__(self, root: Path, warn: Callable[[str], None] = lambda message: None):
        self.root, self.warn = root, warn

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, if it is there and whole: manifest readable, every payload file of its size, none missing or extra.

        A broken one is moved to quarantine with a warning, and is a miss. A newer schema raises StoreError.
        """
        folder = self.folder(kind, key)
        if not folder.is_dir():
            return None
        problem, artifact = self.inspect(folder)
        if problem is None:
            return artifact
        self._quarantine(folder, problem)
        return None

    def inspect(self, folder: Path, full: bool = False) -> tuple[str | None, Artifact | None]:
        """(what is wrong, the artifact). `full` also reads every file and compares its sha256."""
        try:
            raw = json.loads((folder / "manifest.json").read_bytes())
        except (OSError, ValueError):
            return "its manifest.json is missing or unreadable", None
        if isinstance(raw, dict) and isinstance(raw.get("schema"), int) and raw["schema"] > SCHEMA:
            message = f"{folder} was written by a newer tuneline (store schema {raw['schema']}, this one reads {SCHEMA})"
            raise StoreError(message, "upgrade tuneline, or name another `store:`")
        try:
            manifest = Manifest.model_validate(raw)
        except ValidationError:
            return "its manifest.json is damaged", None
        if manifest.key != folder.name or manifest.kind != folder.parent.parent.name:
            return f"its manifest is of {manifest.kind}/{manifest.key}", None
        there = {path: size for path, size in _sizes(folder / "payload")}
        expected = {file.path: file.size for file in manifest.files}
        for path in sorted(there.keys() | expected.keys()):
            if path not in there:
                return f"payload/{path} is missing", None
            if path not in expected:
                return f"payload/{path} does not belong to it", None
            if there[path] != expected[path]:
                return f"payload/{path} has {there[path]} bytes instead of {expected[path]}", None
        for file in manifest.files if full else ():
            try:
                if sha256(folder / "payload" / file.path) != file.sha256:
                    return f"payload/{file.path} {CHANGED}", None
            except OSError as error:
                return f"payload/{file.path} cannot be read: {error.strerror}", None
        return None, Artifact(folder, manifest)

    def verify(self, folder: Path) -> str | None:
        """What is wrong with an artifact once every byte is read; None if nothing. A damaged one goes to quarantine."""
        problem, _ = self.inspect(folder, full=True)
        if problem:
            self._quarantine(folder, problem)
        return problem

    def artifacts(self) -> Iterator[Path]:
        """Folders of all artifacts, broken ones too."""
        yield from sorted(path for path in self.root.glob("[a-z]*/??/*") if path.is_dir())

    @contextmanager
    def locked(
        self, key: str, on_wait: Callable[[], None] = lambda: None, keep_waiting: Callable[[], bool] = lambda: True
    ) -> Iterator[int]:
        """Holds the key's lock; yields its file descriptor, which a child may inherit to hold it on.

        Raises BlockingIOError once another holds it and `keep_waiting` says no.
        """
        folder = self.root / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _not_writable(self.root, error) from error
        try:
            waiting = False
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not keep_waiting():
                        raise
                    if not waiting:
                        on_wait()
                    waiting = True
                    time.sleep(POLL)
            yield descriptor
        finally:
            os.close(descriptor)

    def building(self, key: str) -> Path:
        """An empty folder to build in, on the store's filesystem. Only for the holder of the key's lock."""
        folder = self.root / ".building" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, built: Path, manifest: Callable[[str, tuple[File, ...]], Manifest]) -> Artifact:
        """Hashes and syncs what was built, writes the manifest last, and renames it into place.

        `manifest` makes it from (digest, files). Only for the holder of the key's lock.
        """
        files = tuple(File(path=path, size=size, sha256=sha256(built / "payload" / path)) for path, size in _sizes(built / "payload"))
        if not files:
            raise StageFailed("bug", "the program ended well but left an empty payload")
        document = manifest(digest(files), files)
        _write_synced(built / "manifest.json", document.model_dump_json(by_alias=True, indent=1).encode())
        for folder, _, names in os.walk(built):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        target = self.folder(document.kind, document.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # built again by force
            replaced = self.building(f"{document.key}-replaced")
            target.rename(replaced / "old")
            built.rename(target)
            shutil.rmtree(replaced)
        else:
            built.rename(target)
        sync(target.parent)
        return Artifact(target, document)

    def _quarantine(self, folder: Path, problem: str) -> None:
        with self._locked_now(folder.name) as free:
            if not free:
                return  # somebody is building it anew this moment
            problem_now, _ = self.inspect(folder)
            if folder.is_dir() and (problem_now or problem.endswith(CHANGED)):
                self._move_away(folder, problem)

    @contextmanager
    def _locked_now(self, key: str) -> Iterator[bool]:
        """Whether the key's lock was free, and is held now."""
        try:
            with self.locked(key, keep_waiting=lambda: False):
                yield True
        except BlockingIOError:
            yield False

    def _move_away(self, folder: Path, problem: str) -> None:
        target = self.root / ".quarantine" / f"{folder.parent.parent.name}-{folder.name}-{time.time_ns()}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
        except FileNotFoundError:
            return  # another run was faster
        except OSError as error:
            raise _not_writable(self.root, error) from error
        self.warn(f"{folder.parent.parent.name}/{folder.name[:12]} in the store is broken: {problem}; moved to {target} and built again")


def digest(files: tuple[File, ...]) -> str:
    """sha256 over the sorted (path, sha256) of a payload."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(payload: Path) -> list[tuple[str, int]]:
    """(relative path, bytes) of every file, sorted. A link is no file of ours: it counts as size -1."""
    found = []
    for folder, folders, names in os.walk(payload):
        for name in names + [name for name in folders if Path(folder, name).is_symlink()]:
            path = Path(folder, name)
            found.append((path.relative_to(payload).as_posix(), -1 if path.is_symlink() else path.stat().st_size))
    return sorted(found)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_writable(root: Path, error: OSError) -> StoreError:
    if error.errno == errno.ENOSPC:
        return StoreError(f"the disk of {root} is full", "free some space and run again: finished work is kept")
    return StoreError(f"the store {root} cannot be written: {error.strerror}", "check its permissions, or name another `store:`")
