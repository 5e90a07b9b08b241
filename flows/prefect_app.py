"""Prefect's own server, with one mend: on SQLite it could stand still for a minute.

A statement that fails ("database is locked") leaves its cursor open, in a cycle with the traceback. The garbage collector frees it later,
on the event loop's thread, and resets its statement, for which SQLite takes the connection's mutex. If that connection waits for the write
lock just then, a minute at most, and a transaction of the same loop holds it, each waits for the other, and no request is answered. So the
cursor of a failed statement is closed at once, by the thread of its connection. (Prefect 3.9.1, SQLAlchemy 2.1.9, aiosqlite 0.22.1.)
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiosqlite
from prefect.server.api.server import create_app

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

    return await self._conn._execute(run)


patch(aiosqlite.Cursor, "_execute", _execute)
