"""Detect full and read-only disks behind libraries' errors, and describe them to users."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tuneline.errors import StageFailed

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Messages of libraries that drop errno: safetensors and torch's old format quote the system's text, torch's zip writer does not.
TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "basic_ios::clear: iostream error",
    "Not enough disk space",
)
SHORT = " requested and "  # numpy's short write: an OSError without errno
FULL = 1 << 20  # bytes; a disk with less free space counts as full
ROOM = 16 << 20  # bytes that a run needs for its records, logs and Prefect's database
HINT = "free space with `tuneline gc`, or move to a larger disk (the store alone with `store:`); finished work is kept"
WRITABLE = "make it writable, or name another `store:`; finished work is kept"


def is_of_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, comes from the disk."""
    return any(
        (isinstance(cause, OSError) and (cause.errno in NUMBERS or SHORT in str(cause))) or any(text in str(cause) for text in TEXTS)
        for cause in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def of_program(error: BaseException, *folders: Path) -> StageFailed:
    """Return the failure for a disk error of a program that writes into `folders`."""
    system = next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EIO)), None)
    if system:
        return of_flow(system, folders[0])
    if any("Read-only file system" in str(cause) for cause in causes(error)):
        return StageFailed("disk", str(error), WRITABLE)
    return full(*folders)


def full(*folders: Path) -> StageFailed:
    """Return the failure for a full disk. Names the folder with the least free space."""
    folder = min(folders, key=free)
    written = size_of(folder)
    wrote = f"the program had written {human(written)} there and needs more space"
    return StageFailed("disk", f"the disk of {folder} is full: {wrote}; without them {_room(folder, free(folder) + written)}", HINT)


def of_flow(error: OSError, folder: Path) -> StageFailed:
    """Return the failure for a disk error outside of a program. Names `folder` if the error has no file name."""
    place = error.filename2 or error.filename  # the target of a copy
    place = Path(os.fsdecode(place)) if place else folder
    message = f"{place}: {os.strerror(error.errno or 0)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageFailed("disk", f"{message}; {_room(place, free(place))}", HINT)
    return StageFailed("disk", message, WRITABLE)


def is_full(*folders: Path) -> bool:
    return min(map(free, folders)) < FULL


def size_of(folder: Path) -> int:
    """Return the size of a folder's files in bytes. Files may disappear meanwhile."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(root, name)).st_size
    return size


def human(size: float) -> str:
    """Format bytes with decimal units: 1 MB is 10^6."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _room(folder: Path, bytes_free: int) -> str:
    return f"{human(bytes_free)} of {human(shutil.disk_usage(_there(folder)).total)} are free"


def free(folder: Path) -> int:
    return shutil.disk_usage(_there(folder)).free


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
