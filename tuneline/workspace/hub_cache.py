"""Where huggingface_hub keeps what it downloaded, read as plain files: its library is heavy, and nothing here may wait for a network.

<cache>/models--OWNER--NAME/refs/REVISION            the commit that a branch or tag meant when it was last fetched
<cache>/models--OWNER--NAME/snapshots/COMMIT/        the files
"""

from __future__ import annotations

import os
import re
from pathlib import Path

COMMIT = re.compile(r"^[0-9a-f]{40}$")


def cache_folder() -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def cached_commit(repository_type: str, repository: str, revision: str) -> str | None:
    """What `revision` meant when it was last fetched; None for one that never was. `repository_type` is `model` or `dataset`."""
    if COMMIT.match(revision):
        return revision
    folder = _folder(repository_type, repository)
    reference = folder / "refs" / revision
    if reference.is_file():
        return reference.read_text().strip()
    # What was fetched by its commit, as programs do, has no reference. A single one was `main`.
    commits = [path.name for path in folder.glob("snapshots/*")] if revision == "main" and not (folder / "refs").exists() else []
    return commits[0] if len(commits) == 1 else None


def cached_file(repository: str, revision: str, name: str) -> Path | None:
    """A file of a model's repository, where it has been fetched."""
    commit = cached_commit("model", repository, revision)
    file = _folder("model", repository) / "snapshots" / (commit or "") / name
    return file if file.is_file() else None


class HubCache:
    """What is known of the hub without asking it; `flows.run.hub.Hub` asks."""

    def commit(self, repository_type: str, repository: str, revision: str) -> str | None:
        """Of a branch or tag None: what it means now is looked up when a run starts."""
        return revision if COMMIT.match(revision) else None

    def config(self, repository: str, revision: str) -> bytes | None:
        """A model's config.json; None where it has not been fetched."""
        file = cached_file(repository, revision, "config.json")
        return file.read_bytes() if file else None


def _folder(repository_type: str, repository: str) -> Path:
    return cache_folder() / f"{repository_type}s--{repository.replace('/', '--')}"
