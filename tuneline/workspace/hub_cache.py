"""Read the download cache of huggingface_hub as plain files: importing the library is slow, and nothing here may use the network.

<cache>/models--OWNER--NAME/refs/REVISION            commit of a branch or tag when it was last fetched
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
    """Return the commit of `revision` when it was last fetched, None if it never was. `repository_type`: `model` or `dataset`."""
    if COMMIT.match(revision):
        return revision
    folder = _folder(repository_type, repository)
    reference = folder / "refs" / revision
    if reference.is_file():
        return reference.read_text().strip()
    # Snapshots fetched by commit, as programs do, have no reference. If there is only one, assume that it was `main`.
    commits = [path.name for path in folder.glob("snapshots/*")] if revision == "main" and not (folder / "refs").exists() else []
    return commits[0] if len(commits) == 1 else None


def cached_file(repository: str, revision: str, name: str) -> Path | None:
    """Return a file of a model repository, or None if it has not been fetched."""
    commit = cached_commit("model", repository, revision)
    file = _folder("model", repository) / "snapshots" / (commit or "") / name
    return file if file.is_file() else None


class HubCache:
    """Answers about the hub without network access. `flows.run.hub.Hub` queries the hub."""

    def commit(self, repository_type: str, repository: str, revision: str) -> str | None:
        """Return None for a branch or tag: its commit is looked up when a run starts."""
        return revision if COMMIT.match(revision) else None

    def config(self, repository: str, revision: str) -> bytes | None:
        """Return a model's config.json, or None if it has not been fetched."""
        file = cached_file(repository, revision, "config.json")
        return file.read_bytes() if file else None


def _folder(repository_type: str, repository: str) -> Path:
    return cache_folder() / f"{repository_type}s--{repository.replace('/', '--')}"
