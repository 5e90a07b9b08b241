"""The folder that an export writes: what it may replace, and how it appears whole.

The export is written into `.NAME-export` beside the folder NAME, and takes its place by renames. The hidden folder is locked while an
export works in it; the next export to the same place removes what a killed one has left there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneline.errors import ConfigError, Problem
from tuneline.files import open_lock, try_lock
from tuneline.workspace.cards import is_export
from tuneline.workspace.file_names import CARD
from tuneline.workspace.workspace import Workspace

WORK, EARLIER = "work", "earlier"


def check_target(given: Path, force: bool, workspace: Workspace) -> Path:
    """Return the folder to write, with links resolved. Raises ConfigError unless it is missing, empty, an earlier export, or to be replaced
    by --force. Nothing replaces a folder that holds the project, the current folder or the user's home."""
    target = given.resolve()

    def refused(found: str, hint: str = "name another folder") -> ConfigError:
        return ConfigError([Problem("", found, hint, place=str(given))])

    if target.exists() and not target.is_dir():
        raise refused("found a file, expected a folder")
    if not target.parent.is_dir():
        raise refused(f"found no folder {target.parent}", "create it")
    store, root = workspace.store.root.resolve(), workspace.root.resolve()
    for kept, what in ((store, "the store"), (root, "the project"), (Path.cwd(), "the current folder"), (Path.home(), "your home")):
        if kept.is_relative_to(target):
            raise refused(f"found a folder that holds {what}, expected one that an export may replace")
    if target.is_relative_to(store) or target.is_relative_to(root / ".tuneline"):
        raise refused("found a folder inside the store, expected one outside")
    if target.is_mount():  # an export takes its place by a rename
        raise refused("found a mount point, which cannot be replaced", f"name a folder inside it: {given / 'model'}")
    if force or not target.is_dir() or not any(target.iterdir()):
        return target
    if (target / ".git").exists():
        raise refused("found a git repository, which an export would replace", "name another folder, or replace it by --force")
    if not is_export(target):
        found = f"found a folder that is not empty and no earlier export (no {CARD} with the tag `tuneline`)"
        raise refused(found, "name another folder, or replace it by --force")
    return target


@contextmanager
def scratch_for(target: Path) -> Iterator[Path]:
    """Yield an empty folder on the target's disk, which is removed at the end. Raises ConfigError while another export writes there, or
    if nothing can be written there."""
    folder = target.with_name(f".{target.name}-export")
    try:
        folder.mkdir(exist_ok=True)
        lock = open_lock(folder / "lock")
    except OSError as error:
        found = f"cannot write the folder {folder.name} beside it: {error.strerror}"
        raise ConfigError([Problem("", found, "name another folder", place=str(target))]) from None
    if not try_lock(lock):
        os.close(lock)
        raise ConfigError([Problem("", "found another export that writes this folder", "wait until it has ended", place=str(target))])
    if (folder / WORK / EARLIER).exists() and not target.exists():  # killed between the two renames
        (folder / WORK / EARLIER).rename(target)
    try:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        (folder / WORK).mkdir()
        yield folder / WORK
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def replace(target: Path, scratch: Path, made: Path) -> None:
    """Put the folder `made`, in `scratch`, in the target's place."""
    if target.exists():
        target.rename(scratch / EARLIER)
    made.rename(target)
