"""`tuneline gc`: remove from the store what no kept run needs.

It keeps the artifacts that these name, and all their inputs, including an adapter's base:

    the last N runs of each pipeline, the last one that completed, and all that have ended otherwise since then
    every run younger than `older_than`, and every run of a pipeline that is running now
    cache hits of `plan` for the current pipelines.yaml
    every run of another workspace that uses the same store

Of the rest, it removes only what a run of this workspace names, unless `everything` is set, and never what is being built. It
also removes leftovers of killed runs and of a killed gc, the quarantine, (with `older_than`) unfinished work that no run has
resumed, and records of runs that ended before `history`, unless they are kept or name remaining artifacts.

Concurrent runs are safe: gc takes an artifact's lock first and reads the run records after that, so it sees what a run has
just built; and a run looks up an artifact and records it under `Store.shared_lock`, which excludes removal.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from tuneline import disk
from tuneline.config.pools import interval
from tuneline.errors import ConfigError, Problem
from tuneline.planning.gc_runs import Policy, days, kept, names, spent
from tuneline.planning.plan import plan
from tuneline.workspace.runs import RunRecord, Runs
from tuneline.workspace.workspace import Workspace

UNLOCKED = ("trash", "quarantine")
BATCH = 256  # artifacts whose locks are held at the same time: far below the usual limit of 1,024 open files


@dataclass(frozen=True)
class Item:
    """An item in the store or workspace. `kind`: a stage's, or `trash`, `building`, `quarantine`, `work`, `record`; `size`:
    bytes including `meta/`; `used_by`: `pipeline/stage` of the newest run that names it."""

    kind: str
    key: str
    path: Path
    size: int
    age: timedelta
    used_by: str
    why: str
    removed: bool


def collect(workspace: Workspace, policy: Policy, dry_run: bool, warn: Callable[[str], None] = lambda message: None) -> list[Item]:
    """List all items, and remove those with `removed`, except in a dry run. Raises StoreError if it is unknown what runs need."""
    workspace.store.check()
    return Collection(workspace, policy, dict(_planned(workspace)), warn).run(dry_run)


def _planned(workspace: Workspace) -> Iterator[tuple[str, str]]:
    for name in workspace.loaded.spec.pipelines:
        for row in plan(workspace, name):
            if row.key:
                yield f"{row.kind}/{row.key}", f"needed by pipelines.yaml: {name}/{row.stage}"


class Collection:
    def __init__(self, workspace: Workspace, policy: Policy, planned: dict[str, str], warn: Callable[[str], None]):
        self.store, self.runs, self.work = workspace.store, workspace.runs, workspace.work("")
        self.policy, self.planned, self.warn, self.history = policy, planned, warn, interval(workspace.loaded.spec.history)
        self._parents: dict[str, list[str]] = {}

    def run(self, dry_run: bool) -> list[Item]:
        items = self._artifacts() + self._leftovers()
        if dry_run or not any(item.removed for item in items):
            return items + self._records(items, dry_run)
        with self.store.exclusive_lock():
            pass  # raises for a store that cannot be written, before anything is changed
        done = {item.path: item for item in items}
        removable = [item for item in items if item.removed]
        for start in range(0, len(removable), BATCH):
            batch = removable[start : start + BATCH]
            for item in self._remove(batch):
                done[item.path] = item
        return [*done.values(), *self._records(list(done.values()), dry_run)]

    def _remove(self, batch: list[Item]) -> list[Item]:
        """Remove items; return them with their outcome: those in use by now are kept."""
        out, trash = [], []
        with self.store.exclusive_lock(), ExitStack() as locks:
            lock_names = {_lock_of(item.key) for item in batch if item.kind not in UNLOCKED}
            free = {name: locks.enter_context(self.store.try_lock(name)) for name in lock_names}
            needed = self._needed(self.runs.every())
            for item in batch:
                why = needed.get(f"{item.kind}/{item.key}") or ("" if free.get(_lock_of(item.key), True) else "a run holds its lock")
                if why:
                    item = replace(item, why=why, removed=False)
                elif item.kind == "trash":
                    trash.append(item.path)
                elif item.kind == "work":  # may be on another disk than the store
                    trash.append(item.path.rename(item.path.with_name(f".{item.path.name}")))
                else:
                    trash.append(self.store.move_to_trash(item.path))
                out.append(item)
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)  # another gc may delete it at the same time
        return out

    # --- artifacts -------------------------------------------------------------------------------------------------------

    def _artifacts(self) -> list[Item]:
        records = self.runs.every()
        needed, named = self._needed(records), _named(records)
        out = []
        for folder in self.store.artifacts():
            kind, key = folder.parent.parent.name, folder.name
            name = f"{kind}/{key}"
            why = needed.get(name) or (
                "" if name in named or self.policy.everything else "not named by any run of this workspace (remove with `--all`)"
            )
            removed = not why
            if removed:
                why = "no kept run needs it" if name in named else "no run names it"
            out.append(_item(kind, key, folder, named.get(name, ""), why, removed))
        return out

    def _needed(self, records: list[RunRecord]) -> dict[str, str]:
        """Return why each needed artifact is kept, by `kind/key`."""
        roots: dict[str, str] = {}
        for name, why in [*self._of_records(records), *self.planned.items(), *self._of_others()]:
            roots.setdefault(name, why)
        waiting = list(roots)
        for name in waiting:
            for parent in self._parents_of(name):
                if parent not in roots:
                    roots[parent] = f"{name[: name.index('/') + 13]} was made from it"
                    waiting.append(parent)
        return roots

    def _of_records(self, records: list[RunRecord]) -> Iterator[tuple[str, str]]:
        """Yield the artifacts of kept runs, newest first, so that the first reason for an artifact is the newest run's."""
        reasons = kept(records, self.policy, self.runs)
        for record in records:
            if why := reasons.get(record.run_id):
                yield from ((name, why) for name in names(record))

    def _of_others(self) -> Iterator[tuple[str, str]]:
        for file, folder in self.store.workspaces().items():
            if folder == self.runs.folder:
                continue
            if not folder.parent.parent.is_dir():
                gone = f"found no folder {folder.parent.parent}, which also uses this store: what its runs need is unknown"
                self.warn(f"{gone} (delete {file} if the folder is gone for good)")
            for name in _named(Runs(folder).every()):
                yield name, f"{folder.parent.parent} uses it"

    def _parents_of(self, name: str) -> list[str]:
        """Return the inputs of an artifact; empty for a missing or broken one. Raises StoreError for a newer schema."""
        if name not in self._parents:
            kind, key = name.split("/")
            folder = self.store.folder(kind, key)
            artifact = self.store.inspect(folder)[1] if folder.is_dir() else None
            if artifact is None:
                return []
            base = artifact.manifest.base
            self._parents[name] = [*artifact.manifest.parents.values(), *([f"{base.kind}/{base.key}"] if base else [])]
        return self._parents[name]

    # --- leftovers -------------------------------------------------------------------------------------------------------

    def _leftovers(self) -> list[Item]:
        root = self.store.root
        work = _folders(self.work)
        trash = [*_folders(root / ".trash"), *(path for path in work if path.name.startswith("."))]
        found = [_item("trash", path.name, path, "", "a gc was killed before it was deleted", True) for path in trash]
        found += [self._building(path) for path in _folders(root / ".building")]
        found += [self._old("quarantine", path, "broken, never used again") for path in _folders(root / ".quarantine")]
        return found + [self._unfinished(path) for path in work if path not in trash]

    def _building(self, path: Path) -> Item:
        free = self._lock_is_free(path.name)
        return _item("building", path.name, path, "", "its run was killed" if free else "being built", free)

    def _old(self, kind: str, path: Path, why: str) -> Item:
        item = _item(kind, path.name, path, "", why, True)
        if self.policy.older_than and item.age < self.policy.older_than:
            return replace(item, why=f"younger than {days(self.policy.older_than)}", removed=False)
        return item

    def _unfinished(self, path: Path) -> Item:
        """Return the item of an unfinished stage's checkpoints. They are removed only by age, because a run would resume from them."""
        item = self._old("work", path, "unfinished, and old")
        why = ""
        if any(name.endswith(path.name) for name in self.planned):
            why = "unfinished; a run resumes from it"
        elif self.policy.older_than is None:
            why = "unfinished; removed only by age (`--older-than`)"
        elif any(map(self.runs.alive, self.runs.every())):
            why = "a run of this workspace is in progress"
        return replace(item, why=why, removed=False) if why else item

    def _records(self, items: list[Item], dry_run: bool) -> list[Item]:
        """Remove run records that are no longer needed, with their reports. `items`: the artifacts with their outcome."""
        records, left = self.runs.every(), {f"{item.kind}/{item.key}" for item in items if not item.removed}
        stay, out = kept(records, self.policy, self.runs), []
        for record, age in spent(records, stay.keys(), left, self.history):
            files = self.runs.files(record)
            size = sum(file.stat().st_size for file in files)
            why = f"ended, older than {days(self.history)} (`history`)"
            out.append(Item("record", record.run_id, files[-1], size, age, record.pipeline, why, True))
            if not dry_run:
                self.runs.remove(record)
        return out

    def _lock_is_free(self, key: str) -> bool:
        lock = self.store.root / ".locks" / _lock_of(key)
        if not lock.exists():
            return True
        with self.store.try_lock(lock.name) as free:
            return free


def _named(records: Iterable[RunRecord]) -> dict[str, str]:
    """Return the newest `pipeline/stage` that named each artifact, by `kind/key`."""
    found: dict[str, str] = {}
    for record in records:
        for stage in record.stages:
            if stage.key:
                found.setdefault(f"{stage.kind}/{stage.key}", f"{record.pipeline}/{stage.stage}")
    return found


def _item(kind: str, key: str, path: Path, used_by: str, why: str, removed: bool) -> Item:
    try:
        changed = max(file.stat().st_mtime for file in (path, *path.glob("*")))
    except FileNotFoundError:  # a run ended or began at the same time
        changed = time.time()
    return Item(kind, key, path, disk.size_of(path), timedelta(seconds=max(0.0, time.time() - changed)), used_by, why, removed)


def _lock_of(key: str) -> str:
    return key.removesuffix("-replaced")


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []


def age(text: str) -> timedelta:
    """Parse `30d`, `12h` or `2w`. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if not found:
        raise ConfigError(
            [Problem("", f"found {text!r}, expected a whole number of hours, days or weeks: 12h, 30d, 2w", place="--older-than")]
        )
    return int(found[1]) * {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[found[2]]


def as_json(items: Iterable[Item]) -> list[dict[str, object]]:
    return [{**vars(item), "path": str(item.path), "age": round(item.age.total_seconds())} for item in items]
