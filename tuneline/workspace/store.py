"""The store: finished artifacts, found by key, published atomically.

    <store>/<kind>/<key[:2]>/<key>/{payload/, meta/, manifest.json}      an artifact; complete if the manifest exists
    <store>/.building/<key>/                                            an artifact in progress, under the key's lock
    <store>/.quarantine/                                                broken artifacts; kept for inspection, never used
    <store>/.trash/                                                     removed by `tuneline gc`, about to be deleted
    <store>/.locks/<key>                                                an flock; the kernel frees it when its holder dies
    <store>/.workspaces/                                                users of the store: folders of run records, one file each
    <store>/store.json                                                  the schema version

An artifact is added by one rename after everything is on disk, and removed by one, so a reader never sees a part of one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from tuneline import disk
from tuneline.canonical import key_of
from tuneline.errors import StageFailed, StoreError
from tuneline.files import hold_lock, open_lock, sha256, sync, try_lock, write_atomically
from tuneline.workspace.artifact import SCHEMA, Artifact, File, Manifest, digest, sizes
from tuneline.workspace.file_names import MANIFEST, PAYLOAD

CHANGED = "has changed since it was written"
POLL = 0.2  # seconds between two attempts to take a lock
KEY = re.compile("[0-9a-f]{64}")
OTHER_STORE_HINT = "name another `store:`"


class Store:
    def __init__(self, root: Path, warn: Callable[[str], None] = lambda message: None):
        self.root, self.warn = root, warn

    def check(self) -> None:
        """Raise StoreError if `root` is not a store, or one of a newer tuneline. It need not exist yet."""
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"the store {self.root} is a file, expected a folder", OTHER_STORE_HINT)
        marker = self.root / "store.json"
        try:
            schema = int(json.loads(marker.read_bytes())["schema"])
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be read: {error.strerror}", f"check its permissions, or {OTHER_STORE_HINT}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{marker} is damaged", "delete it if that folder is a store: the next run writes it again") from error
        if schema > SCHEMA:
            message = f"the store {self.root} was made by a newer tuneline (store schema {schema}, this one reads {SCHEMA})"
            raise StoreError(message, f"upgrade tuneline, or {OTHER_STORE_HINT}")

    def prepare(self, runs: Path) -> None:
        """Prepare the store for writing by the workspace whose run records are in `runs`. Raises StoreError."""
        self.check()
        if not self.root.parent.is_dir():
            message = f"found no folder {self.root.parent}, in which to create the store `{self.root.name}`"
            raise StoreError(message, f"create it, mount its disk, or {OTHER_STORE_HINT}")
        try:
            (self.root / ".workspaces").mkdir(parents=True, exist_ok=True)
            for name in (".locks", ".trash"):  # created now, so that gc works when the disk is full
                (self.root / name).mkdir(exist_ok=True)
            user = self.root / ".workspaces" / hashlib.sha256(os.fsencode(runs)).hexdigest()[:16]
            for path, text in ((self.root / "store.json", json.dumps({"schema": SCHEMA})), (user, str(runs))):
                if not path.exists():
                    write_atomically(path, os.fsencode(text), synced=True)
            if not os.access(self.root, os.W_OK):
                raise OSError(errno.EROFS if os.statvfs(self.root).f_flag & os.ST_RDONLY else errno.EACCES, "")
        except OSError as error:
            raise self._not_writable(error) from error

    def workspaces(self) -> dict[Path, Path]:
        """Return the folders of run records that use this store, by the file that registers each."""
        return {file: Path(os.fsdecode(file.read_bytes())) for file in sorted(self.root.glob(".workspaces/[0-9a-f]*"))}

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact if it exists and is complete: readable manifest, all payload files of the right size, none extra.

        A broken artifact is moved to quarantine with a warning, and is a cache miss. Raises StoreError for a newer schema.
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
        """Return (problem, None) or (None, artifact). `full` also reads every file and compares its sha256."""
        try:
            raw = json.loads((folder / MANIFEST).read_bytes())
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
            return f"its manifest belongs to {manifest.kind}/{manifest.key}", None
        try:
            there = dict(sizes(folder / PAYLOAD))
        except OSError as error:  # it may be being removed
            return f"its payload cannot be read: {error.strerror}", None
        expected = {file.path: file.size for file in manifest.files}
        for path in sorted(there.keys() | expected.keys()):
            if path not in there:
                return f"payload/{path} is missing", None
            if path not in expected:
                return f"payload/{path} is not in its manifest", None
            if there[path] != expected[path]:
                return f"payload/{path} has {there[path]} bytes instead of {expected[path]}", None
        for file in manifest.files if full else ():
            try:
                if sha256(folder / PAYLOAD / file.path) != file.sha256:
                    return f"payload/{file.path} {CHANGED}", None
            except OSError as error:
                return f"payload/{file.path} cannot be read: {error.strerror}", None
        if full and digest(manifest.files) != manifest.digest:
            return "its manifest's digest does not match its files", None
        if full and manifest.document and key_of(manifest.document) != manifest.key:
            return "its manifest's document does not match its key", None
        return None, Artifact(folder, manifest)

    def verify(self, folder: Path) -> str | None:
        """Read every byte of an artifact; return its problem, or None. Moves a damaged one to quarantine."""
        problem, _ = self.inspect(folder, full=True)
        if problem:
            try:
                self._quarantine(folder, problem, full=True)
            except StoreError as error:  # a read-only store
                self.warn(f"{folder} stays where it is: {error.message}")
        return problem

    def artifacts(self) -> Iterator[Path]:
        """Yield the folders of all artifacts, including broken ones."""
        found = (path for path in self.root.glob("[a-z]*/??/*") if KEY.fullmatch(path.name) and path.name[:2] == path.parent.name)
        yield from sorted(path for path in found if path.is_dir())  # other files there are not ours

    @contextmanager
    def locked(
        self, key: str, on_wait: Callable[[], None] = lambda: None, keep_waiting: Callable[[], bool] = lambda: True
    ) -> Iterator[int]:
        """Hold the key's lock; yield its file descriptor, which a child process may inherit to keep the lock.

        Raises BlockingIOError if another process holds it and `keep_waiting` returns False.
        """
        folder = self.root / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_lock(folder / key)
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            waiting = False
            while not try_lock(descriptor):
                if not keep_waiting():
                    raise BlockingIOError(errno.EWOULDBLOCK, f"the lock of {key} is held")
                if not waiting:
                    on_wait()
                waiting = True
                time.sleep(POLL)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def shared_lock(self) -> Iterator[None]:
        """Keep `gc` from removing anything: hold it from a cache lookup until the hit is in the run record."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # nothing is removed from a store that cannot be written
                stack.enter_context(hold_lock(self.root / ".locks" / "removal", shared=True))
            yield

    @contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """Keep runs from taking artifacts out of the store. Hold it for moments only."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(self.root / ".locks" / "removal"))
            except OSError as error:
                raise self._not_writable(error) from error
            yield

    def staging_dir(self, key: str) -> Path:
        """Create an empty folder to build in, on the store's file system. The caller must hold the key's lock."""
        folder = self.root / ".building" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, built: Path, manifest: Callable[[str, tuple[File, ...]], Manifest]) -> Artifact:
        """Hash and sync the built files, write the manifest last, and rename the folder into place.

        `manifest` creates the manifest from (digest, files). The caller must hold the key's lock.
        """
        files = tuple(File(path=path, size=size, sha256=sha256(built / PAYLOAD / path)) for path, size in sizes(built / PAYLOAD))
        if not files:
            raise StageFailed("bug", "the program succeeded but left an empty payload")
        document = manifest(digest(files), files)
        write_atomically(built / MANIFEST, document.model_dump_json(by_alias=True, indent=1), synced=True)
        for folder, _, names in os.walk(built):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        target = self.folder(document.kind, document.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # rebuilt by --force
            replaced = self.staging_dir(f"{document.key}-replaced")
            target.rename(replaced / "old")
            built.rename(target)
            shutil.rmtree(replaced)
        else:
            built.rename(target)
        sync(target.parent)
        return Artifact(target, document)

    def _quarantine(self, folder: Path, problem: str, full: bool = False) -> None:
        with self.try_lock(folder.name) as free:
            if not free:
                return  # another run is rebuilding it
            problem_now, _ = self.inspect(folder, full)
            if folder.is_dir() and problem_now:
                self._move_away(folder, problem)

    def move_to_trash(self, folder: Path) -> Path:
        """Move an artifact or another folder of the store to the trash by one rename. The caller deletes the returned path."""
        target = self.root / ".trash" / f"{folder.name}-{time.time_ns()}"
        try:
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
        except FileNotFoundError:
            pass  # another gc removed it first
        except OSError as error:
            raise self._not_writable(error) from error
        return target

    @contextmanager
    def try_lock(self, key: str) -> Iterator[bool]:
        """Try to hold the key's lock; yield whether it is held."""
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
            return  # another run moved it first
        except OSError as error:
            raise self._not_writable(error) from error
        name = f"{folder.parent.parent.name}/{folder.name[:12]}"
        self.warn(f"{name} in the store is broken: {problem}; moved to {target}; it is rebuilt when it is needed")

    def _not_writable(self, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = disk.human(shutil.disk_usage(self.root if self.root.exists() else self.root.parent).free)
            return StoreError(f"the disk of the store {self.root} is full: {free} are free", disk.HINT)
        return StoreError(
            f"the store {self.root} cannot be written: {os.strerror(error.errno or 0)}", f"mount it writable, or {OTHER_STORE_HINT}"
        )
