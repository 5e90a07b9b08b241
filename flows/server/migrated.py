"""Start new databases from a migrated template: Prefect's migrations take 6 s of CPU time, a copy of 700 kB takes none.

    ~/.cache/tuneline/prefect-3.8.8-0123abcd.db      ($XDG_CACHE_HOME) by Prefect's version and a hash of its migrations' names

The first server that creates a database saves it there after the migrations and before it serves requests, so that it is otherwise empty.
Without a readable and writable cache, each database is migrated.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

SAVE_AS = "TUNELINE_SAVE_MIGRATED"  # environment variable of a server: where it saves its new database as the template
MIGRATIONS = "server/database/_migrations/versions/sqlite"


def prepare(database: Path) -> dict[str, str]:
    """Copy the template to `database`, unless that exists. The caller must hold a lock for `database`.

    Returns variables for the server's environment: without a template, they have it save one.
    """
    file = template()
    if database.exists() or file is None:
        return {}
    try:
        place(file, database)
        return {}
    except FileNotFoundError:
        return {SAVE_AS: str(file)}
    except sqlite3.DatabaseError:  # damaged: the next server saves a new one
        with suppress(OSError):
            file.unlink()
        return {SAVE_AS: str(file)}
    except OSError:
        return {}


def template() -> Path | None:
    """Return the template's path, or None if the user has no cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    prefect = find_spec("prefect")
    if not cache.is_absolute() or prefect is None or not prefect.submodule_search_locations:
        return None
    names = sorted(file.name for file in Path(prefect.submodule_search_locations[0], MIGRATIONS).glob("*.py"))
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return cache / "tuneline" / f"prefect-{version('prefect')}-{digest}.db"


def place(file: Path, database: Path) -> None:
    """Copy the template to `database`. Raises sqlite3.DatabaseError if the template is damaged."""
    temporary = database.with_name(f"{database.name}.tmp")
    try:
        shutil.copyfile(file, temporary)
        with closing(sqlite3.connect(temporary)) as copy:
            if copy.execute("PRAGMA quick_check").fetchone() != ("ok",) or not copy.execute("SELECT * FROM alembic_version").fetchone():
                raise sqlite3.DatabaseError(f"{file} is damaged")
        for left in ("-wal", "-shm"):  # left by a deleted database: SQLite would replay them into this one
            Path(f"{database}{left}").unlink(missing_ok=True)
        temporary.replace(database)
    finally:
        temporary.unlink(missing_ok=True)


def save(database: Path, file: Path) -> None:
    """Save `database`, which others may have open, as the template. Concurrent calls write the same content."""
    temporary = file.with_name(f".{file.name}.{uuid4().hex}")
    with suppress(OSError, sqlite3.Error):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(temporary)) as copy:
                source.backup(copy)  # includes its write-ahead log
                copy.execute("PRAGMA journal_mode = DELETE")  # one file
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
