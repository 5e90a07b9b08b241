"""The store: complete artifacts are hits, broken ones are misses with a warning, and locks block."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline.canonical import key_of
from tuneline.errors import StageFailed, StoreError
from tuneline.workspace.artifact import Artifact, File, Manifest, digest
from tuneline.workspace.store import Store

DOCUMENT = {"kind": "dataset"}
KEY = key_of(DOCUMENT)


def publish(store: Store, files: dict[str, bytes], key: str = KEY) -> Artifact:
    with store.locked(key):
        built = store.staging_dir(key)
        for name, content in files.items():
            path = built / "payload" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (built / "meta").mkdir()
        return store.publish(built, lambda payload, found: manifest(key, payload, found))


def manifest(key: str, payload: str, files: tuple[File, ...]) -> Manifest:
    facts = {"document": DOCUMENT, "parents": {}, "metrics": {"rows": 1.0}, "info": {}, "host": {}}
    return Manifest(kind="dataset", type="Dataset", key=key, digest=payload, files=files, **facts)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> Store:
    return Store(tmp_path / "störe with space", warnings.append)


def test_what_is_published_is_found_with_its_digest(store: Store, warnings: list[str]) -> None:
    assert store.find("dataset", KEY) is None
    artifact = publish(store, {"a.txt": b"a", "deep/b.txt": b"b"})
    found = store.find("dataset", KEY)
    assert found is not None
    assert found.manifest == artifact.manifest
    assert [file.path for file in found.manifest.files] == ["a.txt", "deep/b.txt"]
    assert store.verify(found.path) is None
    assert warnings == []
    assert not any((store.root / ".building").iterdir())


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        ({"digest": "beef" * 16}, "its manifest's digest does not match its files"),
        ({"document": {"kind": "dataset", "seed": 2}}, "its manifest's document does not match its key"),
    ],
)
def test_a_manifest_that_was_edited_is_found(store: Store, forged: dict[str, object], said: str) -> None:
    path = publish(store, {"a.txt": b"a"}).path
    content = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(content | forged))
    assert store.verify(path) == said
    assert not path.exists(), "no later run may take it"


def truncate(artifact: Artifact) -> None:
    (artifact.payload / "a.txt").write_bytes(b"")


def remove(artifact: Artifact) -> None:
    (artifact.payload / "a.txt").unlink()


def add(artifact: Artifact) -> None:
    (artifact.payload / "new.txt").write_bytes(b"x")


def link(artifact: Artifact) -> None:
    remove(artifact)
    (artifact.payload / "a.txt").symlink_to("/etc/hostname")


def no_manifest(artifact: Artifact) -> None:
    (artifact.path / "manifest.json").unlink()


def half_manifest(artifact: Artifact) -> None:
    path = artifact.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def other_key(artifact: Artifact) -> None:
    path = artifact.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "key": "cd" * 32}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "payload/a.txt has 0 bytes instead of 1"),
        (remove, "payload/a.txt is missing"),
        (add, "payload/new.txt is not in its manifest"),
        (link, "payload/a.txt has -1 bytes instead of 1"),
        (no_manifest, "manifest.json is missing"),
        (half_manifest, "manifest.json is missing or unreadable"),
        (other_key, "its manifest belongs to dataset/cdcd"),
    ],
)
def test_a_broken_entry_is_quarantined_and_built_again(
    store: Store, warnings: list[str], damage: Callable[[Artifact], None], said: str
) -> None:
    damage(publish(store, {"a.txt": b"a"}))
    assert store.find("dataset", KEY) is None
    assert len(warnings) == 1
    assert said in warnings[0]
    assert len(list((store.root / ".quarantine").iterdir())) == 1
    publish(store, {"a.txt": b"a"})
    assert store.find("dataset", KEY) is not None


def test_a_flipped_byte_is_found_by_verify_only(store: Store, warnings: list[str]) -> None:
    artifact = publish(store, {"a.txt": b"abc"})
    (artifact.payload / "a.txt").write_bytes(b"abd")
    assert store.find("dataset", KEY) is not None
    assert store.verify(artifact.path) == "payload/a.txt has changed since it was written"
    assert store.find("dataset", KEY) is None


def test_a_newer_schema_is_refused_and_left_alone(store: Store) -> None:
    artifact = publish(store, {"a.txt": b"a"})
    path = artifact.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "schema": 99}))
    with pytest.raises(StoreError, match=r"newer tuneline \(store schema 99"):
        store.find("dataset", KEY)
    assert path.exists()


def test_an_empty_payload_is_a_bug_of_the_program(store: Store) -> None:
    with pytest.raises(StageFailed, match="empty payload"):
        publish(store, {})
    assert store.find("dataset", KEY) is None


def test_a_forced_rebuild_replaces_the_old(store: Store) -> None:
    publish(store, {"a.txt": b"old"})
    publish(store, {"a.txt": b"new"})
    found = store.find("dataset", KEY)
    assert found is not None
    assert (found.payload / "a.txt").read_bytes() == b"new"


def hold(root: Path, ready: str) -> None:
    with Store(root).locked(KEY):
        Path(ready).touch()
        time.sleep(60)


def test_the_lock_of_a_killed_holder_is_free(store: Store, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(store.root, str(ready)))
    process.start()
    while not ready.exists():
        time.sleep(0.02)
    waited: list[bool] = []

    def kill() -> None:
        waited.append(True)
        process.kill()

    with store.locked(KEY, kill):
        assert waited == [True]
    process.join()


@settings(max_examples=30)
@given(
    st.dictionaries(st.text("abcXYZ-_.0", min_size=1, max_size=12).filter(lambda name: name.strip(".")), st.binary(max_size=64), min_size=1)
)
def test_the_digest_depends_on_paths_and_content_alone(files: dict[str, bytes]) -> None:
    import hashlib

    entries = [File(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    assert digest(tuple(entries)) == digest(tuple(reversed(entries)))
    changed = entries[0].model_copy(update={"sha256": "0" * 64})
    assert digest((changed, *entries[1:])) != digest(tuple(entries))
