"""What was read in files outside of the store, remembered by their stat, so that a file of many GB is read once.

A stat may stand for a content only if every later change of the content changes the stat. Two things can break that:

- `cp -p`, `touch -r` or rsync set mtime back. The kernel alone sets ctime, so ctime is compared too.
- A file system's clock ticks: in milliseconds on most, in 2 s on FAT. A file that is written, read and written again within one
  tick keeps its stat (git calls such files racily clean). So nothing is trusted that changed less than `TICK` before we began to
  look, nor what seems to change in the future: it is read again. The clocks of this machine and of a file server are taken to
  agree to within `TICK`.
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
LARGE = 1 << 30  # bytes; reading so many takes about a second
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
Facts = tuple[int, int, int, int]
"""Size, mtime and ctime in nanoseconds, inode."""


def facts_of(status: os.stat_result) -> Facts:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def settled(facts: Facts, began: int) -> bool:
    """Whether any change after `began` (nanoseconds since 1970) shows in the facts."""
    return max(facts[1], facts[2]) < began - TICK


@dataclass(frozen=True)
class Reading:
    """Something that a file's content says. `rules` is another text whenever `of` could answer otherwise for the same content."""

    name: str
    rules: str
    of: Callable[[str], Any]
    """Path to a JSON value."""


def digest_of_code(module: str) -> str:
    """`rules` of a reading that this module decides: no edit of it can leave an old answer in use."""
    return hashlib.sha256(Path(module).read_bytes()).hexdigest()[:16]


class FileMemory:
    """Answers of readings by path and facts, in one JSON file. Losing or damaging it costs only time.

    Threads and processes share it: `save` adds what this process learned to what others have written meanwhile.
    """

    def __init__(self, place: Path):
        self.say: Callable[[str], object] = lambda message: None
        """Told before a large file is read."""
        self._place = place
        self._lock = threading.RLock()
        self._known: dict[str, dict[str, Any]] | None = None  # by reading, then path: [facts, answer]; read when first asked
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
        """Writes what was learned since the last time, if anything."""
        with self._lock, contextlib.suppress(OSError):  # a read-only folder or a full disk only costs time
            if not self._new:
                return
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with hold_lock(self._place.with_suffix(".lock")):
                known = self._read()
                for section, answers in self._new.items():
                    reading = section.partition(" ")[0]
                    for old in [other for other in known if other.partition(" ")[0] == reading and other != section]:
                        del known[old]  # of other rules
                    known.setdefault(section, {}).update(answers)
                write_atomically(self._place, json.dumps(known))
            self._known, self._new = known, {}

    def _read(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._place.read_bytes())
            if isinstance(known, dict) and all(isinstance(answers, dict) for answers in known.values()):
                return known
        return {}  # of an earlier tuneline, which trusted what had just changed


def _section(reading: Reading) -> str:
    return f"{reading.name} {reading.rules}"


class Look:
    """One look at files and folders. It keeps the facts that each had *before* it was first read, for `unchanged` to compare."""

    def __init__(self, memory: FileMemory):
        self._memory = memory
        self._began = time.time_ns()
        self._seen: dict[str, Facts | None] = {}  # None: was not there
        self._globs: dict[str, list[str]] = {}

    def stat(self, path: str) -> os.stat_result | None:
        """Of what links lead to; None where nothing is."""
        status = _stat(path)
        self._seen.setdefault(path, facts_of(status) if status else None)
        return status

    def file(self, path: str) -> Facts:
        """Raises OSError where it is not there."""
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
        """What the reading says of a file that had these facts before, from memory where they vouch for it. Raises OSError."""
        answer = self._memory.recall(reading, path, facts)
        if answer is None:
            if facts[0] >= LARGE:
                self._memory.say(f"reading {path}, {human(facts[0])}; the result is remembered for the next time")
            answer = reading.of(path)
            if settled(facts, self._began):
                self._memory.learn(reading, path, facts, answer)
        return answer

    def facts(self, path: str) -> Facts:
        """Of a file that was there, as they were when it was first looked at."""
        facts = self._seen[path]
        assert facts is not None
        return facts

    def unchanged(self) -> bool:
        """Whether a second look would see the same, by stat alone.

        A file that changed has other facts. One that came or went changed its folder, which was listed and has facts as well. `False`
        may be a false alarm: then only another look can tell.
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
    except ValueError:  # a NUL in the name
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
