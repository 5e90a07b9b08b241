"""A local folder laid out like a hub's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_layout(cache: Path, model: Path) -> None:
    """The hub's cache after a download: blobs, and a snapshot of links to them."""
    repository = cache / "models--tests--pico"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs"):
        folder.mkdir(parents=True)
    for file in filter(Path.is_file, model.rglob("*")):
        blob = repository / "blobs" / digest_of(file)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
