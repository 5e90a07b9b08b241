"""Cache of what was read from files outside of the store, by their stat, so that a file of many GB is read once.

A stat identifies a content only if every later change of the content changes the stat. Two things can break that:

- `cp -p`, `touch -r` or rsync set mtime back. Only the kernel sets ctime, so ctime is compared too.
- Timestamps have a resolution: milliseconds on most file systems, 2 s on FAT. A file that is written, read and written again
  within one tick keeps its stat (git calls such files racily clean). So a stat less than `TICK` older than the start of the
  look, or in the future, is not trusted, and the file is read again. The clocks of this machine and of a file server are
  assumed to agree to within `TICK`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.disk import human
from tuneline.files import hold_lock, write_atomically

TICK = 2_000_000_000  # nanoseconds
LARGE = 1 << 30  # bytes; reading this much takes about a second
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
Facts = tuple[int, int, int, int]
"""Size, mtime and ctime in nanoseconds, inode."""


def facts_of(status: os.stat_result) -> Facts:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def settled(facts: Facts, began: int) -> bool:
    """Return whether any change after `began` (nanoseconds since 1970) would change the facts."""
    return max(facts[1], facts[2]) < began - TICK


@dataclass(frozen=True)
class Reading:
    """A function of a file's content. `rules` must change whenever `of` could return another value for the same content."""

    name: str
    rules: str
    of: Callable[[str], Any]
    """Takes a path, returns a JSON value."""


def digest_of_code(module: str) -> str:
    """Return `rules` for a reading that this module implements, so that any edit of it invalidates old answers."""
    return hashlib.sha256(Path(module).read_bytes()).hexdigest()[:16]


class FileMemory:
    """Answers of readings by path and facts, in one JSON file. If it is lost or damaged, files are read again.

    Threads and processes share it: `save` merges the answers of this process into those that others have written.
    """

    def __init__(self, place: Path):
        self.say: Callable[[str], object] = lambda message: None
        """Called with a message before a large file is read."""
        self._place = place
        self._lock = threading.RLock()
        self._known: dict[str, dict[str, Any]] | None = None  # by reading, then path: [facts, answer]; loaded on first use
        self._new: dict[str, dict[str, Any]] = {}

    def recall(self, reading: Reading, path: str, facts: Facts) -> Any | None:
        with self._lock:
            if self._known is None:
                self._known = self._read()
            entry = self._known.get(_section(reading), {}).get(path)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == [*facts] else None

    def learn(self, reading: Reading, path: str, facts: Facts, answer: Any) -> None:
        with self._lock:
            for answers in (self._known, self._new):
                if answers is not None:
                    answers.setdefault(_section(reading), {})[path] = [[*facts], answer]

    def save(self) -> None:
        """Write new answers, if there are any."""
        with self._lock, contextlib.suppress(OSError):  # on a read-only folder or full disk, files are read again next time
            if not self._new:
                return
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with hold_lock(self._place.with_suffix(".lock")):
                known = self._read()
                for section, answers in self._new.items():
                    reading = section.partition(" ")[0]
                    for old in [other for other in known if other.partition(" ")[0] == reading and other != section]:
                        del known[old]  # answers of other rules
                    known.setdefault(section, {}).update(answers)
                write_atomically(self._place, json.dumps(known))
            self._known, self._new = known, {}

    def _read(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._place.read_bytes())
            if isinstance(known, dict) and all(isinstance(answers, dict) for answers in known.values()):
                return known
        return {}  # missing, damaged, or written by an earlier tuneline, which trusted recent changes


def _section(reading: Reading) -> str:
    return f"{reading.name} {reading.rules}"


class Look:
    """One pass over files and folders. Keeps the facts that each had *before* it was first read, for `unchanged` to compare."""

    def __init__(self, memory: FileMemory):
        self._memory = memory
        self._began = time.time_ns()
        self._seen: dict[str, Facts | None] = {}  # None: did not exist
        self._globs: dict[str, list[str]] = {}

    def stat(self, path: str) -> os.stat_result | None:
        """Return the stat of a path, following links; None if it does not exist."""
        status = _stat(path)
        self._seen.setdefault(path, facts_of(status) if status else None)
        return status

    def file(self, path: str) -> Facts:
        """Return the facts of a file. Raises OSError if it does not exist."""
        facts = facts_of(os.stat(path))
        self._seen.setdefault(path, facts)
        return facts

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        self.file(folder)
        with os.scandir(folder) as entries:
            return list(entries)

    def glob(self, pattern: str) -> list[str]:
        self._globs[pattern] = found = sorted(glob.glob(pattern, recursive=True))
        return found

    def read(self, reading: Reading, path: str, facts: Facts) -> Any:
        """Return the reading's answer for a file that has these facts, from memory if possible. Raises OSError."""
        answer = self._memory.recall(reading, path, facts)
        if answer is None:
            if facts[0] >= LARGE:
                self._memory.say(f"reading {path}, {human(facts[0])}; the result is remembered for the next time")
            answer = reading.of(path)
            if settled(facts, self._began):
                self._memory.learn(reading, path, facts, answer)
        return answer

    def facts(self, path: str) -> Facts:
        """Return the facts of an existing file, as of the first look."""
        facts = self._seen[path]
        assert facts is not None
        return facts

    def unchanged(self) -> bool:
        """Return whether a second look would see the same, by stat alone.

        A changed file has other facts. A file that was added or removed changed its folder, which has facts too. `False` may be a
        false alarm; only reading again can decide.
        """
        try:
            for path, facts in self._seen.items():
                status = _stat(path)
                if (facts_of(status) if status else None) != facts or (facts and not settled(facts, self._began)):
                    return False
        except OSError:
            return False
        return all(sorted(glob.glob(pattern, recursive=True)) == found for pattern, found in self._globs.items())


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except ValueError:  # NUL in the name
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
