"""Slots and GPUs of one run, and the progress bar that never keeps a supervisor waiting."""

from __future__ import annotations

import threading
import time

import pytest

from flows import progress
from flows.slots import Slots, visible_gpus
from flows.supervisor import Supervisor
from tuneline.errors import StageFailed
from tuneline.protocol import Event


def test_no_gpu_is_handed_out_twice_and_who_waits_gets_it() -> None:
    slots = Slots(None, ["0", "1", "2"])
    most, seen, lock = [0], set[str](), threading.Lock()

    def stage(gpus: int) -> None:
        with slots.taken(gpus) as ids:
            with lock:
                assert not seen & set(ids)
                seen.update(ids)
                most[0] = max(most[0], len(seen))
            time.sleep(0.02)
            with lock:
                seen.difference_update(ids)

    threads = [threading.Thread(target=stage, args=(gpus,)) for gpus in (1, 2, 1, 3, 1, 2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert most[0] == 3


def test_more_gpus_than_there_are_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(StageFailed, match="resources.gpus is 2, but this machine shows 1"), Slots(None, ["0"]).taken(2):
        pass


def test_one_stage_at_a_time_without_gpus() -> None:
    slots = Slots(None, [])
    with slots.taken(0):
        waiting = threading.Thread(target=lambda: slots.taken(0).__enter__(), daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()


def test_visible_gpus_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_pause_ends_with_the_run() -> None:
    supervisor = Supervisor()
    threading.Timer(0.1, supervisor.stop).start()
    started = time.monotonic()
    supervisor.pause(60)
    assert time.monotonic() - started < 10


def test_a_server_that_is_away_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def hang(percent: float, description: str) -> None:
        asked.append(percent)
        time.sleep(30)

    monkeypatch.setattr(progress, "create_progress_artifact", hang)
    bar = progress.ProgressArtifact("sft")
    started = time.monotonic()
    for step in range(1000):
        bar.show(Event(t=0, type="progress", step=step, total=1000))
    bar.close()
    assert time.monotonic() - started < 10
    assert len(asked) == 1


def test_the_last_progress_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda percent, description: shown.append(percent) or "id")
    monkeypatch.setattr(progress, "update_progress_artifact", lambda artifact, percent, description: shown.append(percent))
    bar = progress.ProgressArtifact("sft")
    for step in (10, 100):
        bar.show(Event(t=0, type="progress", step=step, total=100, message="x"))
        time.sleep(0.2)
    bar.close()
    assert shown == [10.0, 100.0]
