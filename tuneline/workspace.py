"""The folder `.tuneline/` beside pipelines.yaml, and what is known about files outside it.

.tuneline/runtimes/   environments        .tuneline/store/         artifacts (unless `store:` names another place)
.tuneline/work/<key>/ unfinished stages   .tuneline/digests.json   sha256 of outside files, by path, size, mtime, inode
.tuneline/runs/       run records         .tuneline/prefect/       the embedded server's database
.tuneline/server/     of `tuneline up`    .tuneline/benchmarks/    what lm-eval's task files say about data, by runtime
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneline import disk
from tuneline.data_sources import CodeSource
from tuneline.errors import ConfigError, Problem, StoreError
from tuneline.hub_cache import HubCache
from tuneline.load import Loaded
from tuneline.paths import placed, refuse_escape
from tuneline.runs import Runs
from tuneline.source_tree import Selection, select
from tuneline.store import Store, sha256


class Workspace:
    def __init__(self, loaded: Loaded, warn: Callable[[str], None] = lambda message: None, hub: HubCache = HubCache()):  # noqa: B008
        self.loaded, self.root, self.hub = loaded, loaded.root, hub
        self.home = self.root / ".tuneline"
        self.store = Store(placed(self.root, loaded.spec.store), warn)
        self.store.check()
        self.runs = Runs(self.home / "runs")
        self._digests = FileDigests(self.home / "digests.json")

    def work(self, key: str) -> Path:
        return self.home / "work" / key

    def prepare_store(self) -> None:
        """Before a run that may write into it. Raises StoreError for a place where no store can be."""
        if self.store.root.is_relative_to(self.home):
            self.store.root.parent.mkdir(parents=True, exist_ok=True)
        self.store.prepare(self.runs.folder)
        if (free := disk.free(self.home)) < disk.ROOM:
            message = f"the disk of {self.home} is full: {disk.human(free)} are free, a run wants {disk.human(disk.ROOM)} for its records"
            raise StoreError(message, "free some space; `tuneline gc` does where the store is on that disk, too")

    def outside(self, named: str, tree: CodeSource | None = None) -> tuple[list[Path], list[dict[str, Any]]]:
        """Files or the folder that a stage names, and what of them enters its key: content, and names inside a folder;
        of a source tree, only what `tree` selects.

        Raises FileNotFoundError where nothing is there, ConfigError where a link leads out of the folders that the file may name.
        """
        path = placed(self.root, named)
        if tree is not None:
            selection = self.selected(named, tree)
            return selection.paths(), [{"name": name, "sha256": digest} for name, digest in selection.files.items()]
        if path.is_dir():
            files = sorted(
                file for file in path.rglob("*") if file.is_file() and not any(p.startswith(".") for p in file.parts[len(path.parts) :])
            )
            self._refuse_escape([path, *files])
            return [path], [{"name": file.relative_to(path).as_posix(), "sha256": self._digests.of(file)} for file in files]
        pattern = placed(Path(glob.escape(str(self.root))), named)  # of what surrounds the file, no character is a wildcard
        found = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
        matches = [path] if path.is_file() else sorted(match for match in found if match.is_file())
        if not matches:
            raise FileNotFoundError(str(path))
        self._refuse_escape(matches)
        return matches, [{"suffix": suffix(file), "sha256": self._digests.of(file)} for file in matches]

    def selected(self, named: str, tree: CodeSource) -> Selection:
        """The files of a source tree. Raises as `outside`, and ConfigError where none is left."""
        folder = placed(self.root, named)
        if not folder.is_dir():
            if folder.exists():
                raise ConfigError([Problem("", "", f"found a file at {folder}, allowed a folder", "for rows in files: `type: files`")])
            raise FileNotFoundError(str(folder))
        self._refuse_escape([folder])
        selection = select(folder, tree)
        if not selection.files:
            reasons = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.most_common()) or "it is empty"
            raise ConfigError(
                [Problem("", "", f"found no file to read in {folder}; left out: {reasons}", "see include, exclude and licenses")]
            )
        return selection

    def _refuse_escape(self, paths: list[Path]) -> None:
        refuse_escape(paths, self.root, self.loaded.spec.roots)


def suffix(file: Path) -> str:
    """What tells a reader the format: `.jsonl`, `.jsonl.gz`."""
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


class FileDigests:
    """sha256 of files, remembered so that a file of many GB is read once. Losing or damaging the memory costs only time."""

    def __init__(self, memory: Path):
        self._memory = memory
        self._lock = threading.Lock()  # stages that run at the same time ask at the same time
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(memory.read_bytes())

    def of(self, path: Path) -> str:
        status = path.stat()
        facts = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(str(path))
        if known is not None and known[:3] == facts:
            return str(known[3])
        digest = sha256(path)
        with self._lock, contextlib.suppress(OSError):  # a read-only folder only costs time
            self._known[str(path)] = [*facts, digest]
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._memory.with_name(f"{self._memory.name}.{os.getpid()}")
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            temporary.replace(self._memory)
        return digest
