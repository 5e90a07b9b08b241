"""Paths that a pipelines.yaml may name: inside its own folder and those under `roots:`.

There are two checks, because only one may depend on the machine. When the file is loaded, paths are compared as text
(`outside`), so that a file is valid everywhere or nowhere. When a path is opened, links are followed (`refuse_escape`), so
that no link leads out of the allowed folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tuneline.errors import ConfigError, Problem

GLOB = frozenset("*?[")

PACKAGES_ROOT = Path(__file__).resolve().parent.parent
"""Folder with flows/, tasks/, tuneline/ and infra/: the clone, or `tuneline-packages` in site-packages. PYTHONPATH of programs."""


def resolve_path(root: Path, named: str) -> Path:
    """Resolve a path named by a file in the folder `root`: `~` is the home folder, `..` is removed as text."""
    return Path(os.path.normpath(root / os.path.expanduser(named)))


def suffix(file: Path) -> str:
    """Return the suffix that identifies the format: `.jsonl`, `.jsonl.gz`."""
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def allowed_folders(root: Path, roots: Iterable[str]) -> list[Path]:
    return [resolve_path(root, named) for named in (".", *roots)]


def outside(path: Path, allowed: Iterable[Path]) -> bool:
    return not any(path.is_relative_to(folder) for folder in allowed)


def refuse_escape(paths: Iterable[str], root: Path, roots: Sequence[str]) -> None:
    """Raise ConfigError if one of `paths`, with links followed, is outside of the allowed folders of the file in `root`."""
    allowed = [Path(os.path.realpath(folder)) for folder in allowed_folders(root, roots)]
    inside: dict[str, bool] = {}  # by folder: files in it that are not links are inside too
    for path in paths:
        folder = os.path.dirname(path)
        if folder not in inside:
            inside[folder] = not outside(Path(os.path.realpath(folder)), allowed)
        if inside[folder] and not os.path.islink(path):
            continue
        target = Path(os.path.realpath(path))
        if outside(target, allowed):
            found = f"found a link that leads out of the folder of the file: {path} -> {target}"
            raise ConfigError([Problem("", found, f"if this is intended, add `roots: [{target.parent}]` at the top of the file")])


def folder_to_allow(named: str) -> str:
    """Return the folder to add to `roots:` so that `named` is inside, as the user wrote it."""
    parts = Path(os.path.normpath(named)).parts
    plain = next((i for i, part in enumerate(parts) if GLOB & set(part)), len(parts))
    around = Path(*parts[: min(plain, len(parts) - 1)])
    return str(around) if around.parts not in ((), ("/",)) else str(Path(*parts))
