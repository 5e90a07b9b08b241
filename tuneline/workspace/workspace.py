"""The folder `.tuneline/` beside pipelines.yaml.

.tuneline/runtimes/   environments        .tuneline/store/         artifacts (unless `store:` names another place)
.tuneline/work/<key>/ unfinished stages   .tuneline/digests.json   digests of outside files, by their stat
.tuneline/runs/       run records         .tuneline/prefect/       the embedded server's database
.tuneline/server/     of `tuneline up`    .tuneline/benchmarks/    data of lm-eval's task files, by runtime
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tuneline import disk
from tuneline.config.load import Loaded
from tuneline.errors import StoreError
from tuneline.paths import resolve_path
from tuneline.trees.file_memory import FileMemory
from tuneline.workspace.hub_cache import HubCache
from tuneline.workspace.runs import Runs
from tuneline.workspace.store import Store


class Workspace:
    def __init__(self, loaded: Loaded, warn: Callable[[str], None] = lambda message: None, hub: HubCache = HubCache()):  # noqa: B008
        self.loaded, self.root, self.hub = loaded, loaded.root, hub
        self.home = self.root / ".tuneline"
        self.store = Store(resolve_path(self.root, loaded.spec.store), warn)
        self.store.check()
        self.runs = Runs(self.home / "runs")
        self.memory = FileMemory(self.home / "digests.json")

    def work(self, key: str) -> Path:
        return self.home / "work" / key

    def prepare_store(self) -> None:
        """Prepare the store for a run that may write into it. Raises StoreError if it cannot be created or written."""
        if self.store.root.is_relative_to(self.home):
            self.store.root.parent.mkdir(parents=True, exist_ok=True)
        self.store.prepare(self.runs.folder)
        if (free := disk.free(self.home)) < disk.ROOM:
            message = f"the disk of {self.home} is full: {disk.human(free)} are free, a run needs {disk.human(disk.ROOM)} for its records"
            raise StoreError(message, "free some space; `tuneline gc` does if the store is on the same disk")
