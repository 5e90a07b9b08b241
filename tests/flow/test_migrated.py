"""The template of new databases: made by the first server, with nothing but migrations in it, and harmless if it is damaged."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from project import Project

from flows.server import migrated

PIPELINE = """\
version: 1
runtimes: {here: {python: ./bin/python}}
pipelines: {p: {stages: {words: {kind: dataset, sources: [{type: files, path: words.jsonl}], runtime: here}}}}
"""


def rows(database: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def made(path: Path, name: str = "head") -> Path:
    """Write a small database in the form of a template."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"CREATE TABLE alembic_version (version_num); INSERT INTO alembic_version VALUES ('{name}')")
    return path


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = migrated.template()
    assert file is not None
    assert file.parent == tmp_path / "cache" / "tuneline"
    return file


@pytest.mark.slow
def test_the_first_run_makes_it_and_the_next_one_in_another_folder_begins_with_it(
    project: Project, stand_in: Callable[..., None], template: Path, tmp_path: Path
) -> None:
    database = tmp_path / ".tuneline" / "prefect" / "0.db"
    project.write(PIPELINE)
    project.write('{"text": "word"}\n', "words.jsonl")
    project.tuneline("run", "p", PREFECT_API_URL="")
    assert len(rows(database, "SELECT * FROM flow_run")) == 1
    assert [len(rows(template, f"SELECT * FROM {name}")) for name in ("flow_run", "flow", "block_type", "configuration")] == [0] * 4
    assert rows(template, "SELECT * FROM alembic_version") == rows(database, "SELECT * FROM alembic_version")
    assert os.listdir(template.parent) == [template.name]  # no write-ahead log beside it

    with closing(sqlite3.connect(template)) as connection:
        connection.execute("CREATE TABLE mark (number)")
    before = template.read_bytes()
    for file in database.parent.iterdir():
        file.unlink()
    project.tuneline("run", "p", "--force", "words", PREFECT_API_URL="")
    assert rows(database, "SELECT * FROM mark") == []
    assert len(rows(database, "SELECT * FROM flow_run")) == 1
    assert template.read_bytes() == before


def test_a_new_database_is_a_copy_and_an_old_one_stays(template: Path, tmp_path: Path) -> None:
    database = tmp_path / "0.db"
    assert migrated.prepare(database) == {migrated.SAVE_AS: str(template)}
    assert not database.exists()
    made(template)
    (tmp_path / "0.db-wal").write_text("of a database that is gone")
    assert migrated.prepare(database) == {}
    assert rows(database, "SELECT * FROM alembic_version") == [("head",)]
    assert sorted(os.listdir(tmp_path)) == ["0.db", "cache"]
    made(tmp_path / "other.db", "older").replace(database)
    assert migrated.prepare(database) == {}
    assert rows(database, "SELECT * FROM alembic_version") == [("older",)]


@pytest.mark.parametrize("damage", [b"", b"no database at all", None])
def test_a_damaged_one_is_made_again(template: Path, tmp_path: Path, damage: bytes | None) -> None:
    whole = made(template).read_bytes()
    template.write_bytes(whole[:-5000] if damage is None else damage)
    assert migrated.prepare(tmp_path / "0.db") == {migrated.SAVE_AS: str(template)}
    assert not template.exists()
    assert os.listdir(tmp_path) == ["cache"]


def test_what_is_in_the_write_ahead_log_is_saved_and_processes_may_save_at_once(template: Path, tmp_path: Path) -> None:
    database = made(tmp_path / "0.db", "older")
    with closing(sqlite3.connect(database)) as open_elsewhere:
        open_elsewhere.execute("PRAGMA journal_mode = WAL")
        open_elsewhere.execute("UPDATE alembic_version SET version_num = 'head'")
        open_elsewhere.commit()
        together = threading.Barrier(2)

        def save() -> None:
            together.wait()
            for _ in range(20):
                migrated.save(database, template)
                migrated.place(template, tmp_path / f"{threading.get_ident()}.db")

        threads = [threading.Thread(target=save) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [rows(file, "SELECT * FROM alembic_version") for file in tmp_path.glob("*.db")] == [[("head",)]] * 3
    assert os.listdir(template.parent) == [template.name]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert migrated.prepare(tmp_path / "0.db") == {}
    migrated.save(made(tmp_path / "1.db"), tmp_path / "file" / "tuneline" / "template.db")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert migrated.template() is None
    assert migrated.prepare(tmp_path / "0.db") == {}
