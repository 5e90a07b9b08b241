"""Local models by reference, runtimes, and held locks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tuneline.errors import ConfigError, StageFailed
from tuneline.workspace.reference import folder_of, point
from tuneline.workspace.runtimes import RuntimeEnvironment
from tuneline.workspace.store import Store


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    artifact = tmp_path / "artifact"
    (artifact / "payload").mkdir(parents=True)
    (artifact / "meta").mkdir()
    (artifact / "payload" / "reference.json").write_text(json.dumps({"files": [{"path": "config.json", "size": 2, "sha256": "x"}]}))
    point(artifact, folder)
    return artifact


def test_a_touched_or_moved_model_is_found_once_it_is_pointed_at_again(artifact: Path, tmp_path: Path) -> None:
    assert folder_of(artifact / "payload") == tmp_path / "model"
    os.utime(tmp_path / "model" / "config.json", (1, 1))
    with pytest.raises(StageFailed, match="config.json has changed since the run began"):
        folder_of(artifact / "payload")
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    point(artifact, moved)
    assert folder_of(artifact / "payload") == moved


def test_a_model_of_its_own_is_its_folder(tmp_path: Path) -> None:
    assert folder_of(tmp_path) == tmp_path


LOCK = "torch==2.13.0+cpu\n    # via trl\ntrl[peft,vllm]==1.16.0 ; python_version > '3'\nHugging_Face.hub==2.0 \\\n    --hash=sha256:00\n-r other.txt\n"


def test_versions_come_from_the_lock_without_local_suffix(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(LOCK)
    runtime = RuntimeEnvironment("r", tmp_path / "python", lock, tmp_path)
    assert runtime.versions(["torch", "trl", "hugging-face-hub", "peft"]) == {
        "torch": "2.13.0", "trl": "1.16.0", "hugging-face-hub": "2.0", "peft": "absent",
    }  # fmt: skip
    lock.write_text("torch==2.13.0\npeft>=0.2\n")
    with pytest.raises(ConfigError, match=r"lock.txt:2: found `peft>=0.2` in a lock, expected name==version"):
        runtime.versions(["torch"])


def test_versions_come_from_a_python_of_ones_own_or_not_at_all(tmp_path: Path) -> None:
    assert RuntimeEnvironment("mine", Path(sys.executable)).versions(["pytest"]) == {"pytest": pytest.__version__}
    for python in ("/bin/false", str(tmp_path)):
        with pytest.raises(ConfigError, match="does not run as Python"):
            RuntimeEnvironment("mine", Path(python)).versions(["pytest"])


def test_who_no_longer_wants_to_wait_for_a_lock_need_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.locked("key"), pytest.raises(BlockingIOError), store.locked("key", keep_waiting=lambda: False):
        pass
