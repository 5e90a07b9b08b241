"""Prefect's own server with two patches: it saves a new database once it is migrated (`flows.server.migrated`), and it cannot deadlock for
a minute on SQLite.

A statement that fails ("database is locked") leaves its cursor open, in a reference cycle with the traceback. The garbage collector frees
it later, on the event loop's thread, and resets its statement, for which SQLite takes the connection's mutex. If that connection then waits
for the write lock (a minute at most), and a transaction of the same event loop holds that lock, each waits for the other, and no request is
answered. So the thread of the connection closes the cursor of a failed statement at once. (Prefect 3.9.1, SQLAlchemy 2.1.9, aiosqlite
0.22.1.)
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiosqlite
from prefect.server.api.server import create_app
from prefect.server.database.interface import PrefectDBInterface
from sqlalchemy.engine import make_url

from flows.server import migrated
from tuneline.patches import patch

__all__ = ["create_app"]


async def _execute(self: aiosqlite.Cursor, function: Callable[..., Any], *arguments: Any) -> Any:
    def run() -> Any:
        try:
            return function(*arguments)
        except BaseException:
            with suppress(sqlite3.Error):
                self._cursor.close()
            raise

    connection: Any = self._conn  # its _execute has no types
    return await connection._execute(run)


patch(aiosqlite.Cursor, "_execute", _execute)


async def _create_and_save(self: PrefectDBInterface) -> None:
    await self.run_migrations_upgrade()
    database = make_url(self.database_config.connection_url).database
    await asyncio.to_thread(migrated.save, Path(str(database)), Path(os.environ[migrated.SAVE_AS]))


if migrated.SAVE_AS in os.environ:
    patch(PrefectDBInterface, "create_db", _create_and_save)
