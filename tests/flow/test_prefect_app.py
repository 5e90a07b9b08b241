"""The server's patch for SQLite, tested on the library that it patches."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from pathlib import Path

import aiosqlite
import pytest


async def _a_statement_that_failed_is_collected_while_its_connection_waits(database: Path) -> None:
    async with (
        aiosqlite.connect(database, isolation_level=None, timeout=20) as holder,
        aiosqlite.connect(database, isolation_level=None, timeout=20) as waiter,
    ):
        await holder.executescript("PRAGMA journal_mode = WAL; CREATE TABLE numbers (number)")
        await waiter.execute("BEGIN")
        await (await waiter.execute("SELECT * FROM numbers")).close()
        await holder.execute("INSERT INTO numbers VALUES (1)")
        cursor = await waiter.cursor()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            await cursor.execute("INSERT INTO numbers VALUES (2)")
        cycle: list[object] = [cursor]
        cycle.append(cycle)
        await waiter.rollback()
        await holder.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(waiter.execute("INSERT INTO numbers VALUES (3)"))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        del cursor, cycle
        gc.collect()
        await holder.commit()
        await waiting  # "database is locked" once the loop itself had been held up for the whole timeout


@pytest.mark.slow
def test_garbage_does_not_hold_up_the_server(tmp_path: Path) -> None:
    import flows.server.prefect_app  # noqa: F401

    asyncio.run(_a_statement_that_failed_is_collected_while_its_connection_waits(tmp_path / "numbers.db"))
