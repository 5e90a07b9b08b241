"""`tuneline gc`: takes out of the store what no kept run needs.

Kept are what these name, and all that it was made from, an adapter's base too:

    of each pipeline the last N runs, and the last one that completed, and all that ended otherwise since then
    every run younger than `older_than`, and every run of a pipeline that is running now
    what `plan` takes from the store for the pipelines.yaml of today
    every run of another workspace that uses the same store

Of the rest, only what a run of this workspace names goes, unless `everything` is asked for, and never what is being built. With
it go the leftovers of runs and of a gc that were killed, the quarantine, and (with `older_than`) unfinished work that nobody
took up again; and records of runs that ended longer ago than `history`, unless they are kept or name what is left.

Against runs that go on meanwhile: an artifact's lock is taken first and the run records are read after that, so what a run has
just made is seen; and a run finds an artifact and writes it down under `Store.shared_lock`, which excludes the moment of removal.
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
BATCH = 256  # artifacts whose locks are held at a time: far below the usual limit of 1,024 open files


@dataclass(frozen=True)
class Item:
    """Something in the store, or beside it. `kind` is a stage's, or `trash`, `building`, `quarantine`, `work`, `record`; `size`
    in bytes with `meta/`; `used_by` is `pipeline/stage` of the newest run that names it."""

    kind: str
    key: str
    path: Path
    size: int
    age: timedelta
    used_by: str
    why: str
    removed: bool


def collect(workspace: Workspace, policy: Policy, dry_run: bool, warn: Callable[[str], None] = lambda message: None) -> list[Item]:
    """What is there, and what went or, in a dry run, would go. Raises StoreError where what is needed cannot be known."""
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
            pass  # a store that cannot be written says so here, before anything is touched
        done = {item.path: item for item in items}
        removable = [item for item in items if item.removed]
        for start in range(0, len(removable), BATCH):
            batch = removable[start : start + BATCH]
            for item in self._remove(batch):
                done[item.path] = item
        return [*done.values(), *self._records(list(done.values()), dry_run)]

    def _remove(self, batch: list[Item]) -> list[Item]:
        """The items as they turned out: those that somebody uses now stay."""
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
                elif item.kind == "work":  # perhaps on another disk than the store
                    trash.append(item.path.rename(item.path.with_name(f".{item.path.name}")))
                else:
                    trash.append(self.store.move_to_trash(item.path))
                out.append(item)
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)  # another gc may be at it, too
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
        """By `kind/key`: why it is kept."""
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
        """Newest first, so that the first reason given for an artifact is the newest run's."""
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
        """What an artifact was made from; of one that is not there or broken, nothing is known. Raises StoreError for a newer schema."""
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
        """Checkpoints of a stage that has not ended well. They go only by age: another `run` would go on from them."""
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
        """Run records that have nothing more to say, with their reports. `items` as they turned out."""
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
    """By `kind/key`: the newest stage that named it."""
    found: dict[str, str] = {}
    for record in records:
        for stage in record.stages:
            if stage.key:
                found.setdefault(f"{stage.kind}/{stage.key}", f"{record.pipeline}/{stage.stage}")
    return found


def _item(kind: str, key: str, path: Path, used_by: str, why: str, removed: bool) -> Item:
    try:
        changed = max(file.stat().st_mtime for file in (path, *path.glob("*")))
    except FileNotFoundError:  # a run ended or began meanwhile
        changed = time.time()
    return Item(kind, key, path, disk.size_of(path), timedelta(seconds=max(0.0, time.time() - changed)), used_by, why, removed)


def _lock_of(key: str) -> str:
    return key.removesuffix("-replaced")


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []


def age(text: str) -> timedelta:
    """`30d`, `12h`, `2w`. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)
    if not found:
        raise ConfigError(
            [Problem("", f"found {text!r}, expected a whole number of hours, days or weeks: 12h, 30d, 2w", place="--older-than")]
        )
    return int(found[1]) * {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[found[2]]


def as_json(items: Iterable[Item]) -> list[dict[str, object]]:
    return [{**vars(item), "path": str(item.path), "age": round(item.age.total_seconds())} for item in items]
