"""Slots and GPUs of one run, and the progress artifact, which never blocks a supervisor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import PATIENCE, until
from project import ROOT

from flows.machine import visible_gpus
from flows.report import progress
from flows.run.slots import Slots
from flows.run.supervisor import Supervisor
from flows.server.connect import kept
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Event


def test_no_gpu_is_handed_out_twice_and_who_waits_gets_it(tmp_path: Path) -> None:
    slots = [Slots(None, ["0", "1", "2"], tmp_path), Slots(None, ["0", "1", "2"], tmp_path)]  # two runs of one machine
    most, seen, lock = [0], set[str](), threading.Lock()

    def stage(run: int, gpus: int) -> None:
        with slots[run].taken(gpus) as taken:
            with lock:
                assert not seen & set(taken.gpus)
                seen.update(taken.gpus)
                most[0] = max(most[0], len(seen))
            time.sleep(0.05)
            with lock:
                seen.difference_update(taken.gpus)

    threads = [threading.Thread(target=stage, args=(i % 2, gpus)) for i, gpus in enumerate((1, 2, 1, 3, 1, 2, 0, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most[0] == 3


def test_what_the_machine_has_not_got_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"resources\.gpus is 2, but this machine shows 1"), Slots(None, ["0"], tmp_path).taken(2):
        pass
    with pytest.raises(StageFailed, match=r"resources\.devices names 3, but this machine shows 0, 1"):
        Slots(None, ["0", "1"], tmp_path).taken(1, [3]).__enter__()


def test_pinned_devices_are_those_that_are_taken(tmp_path: Path) -> None:
    slots, other = Slots(None, ["0", "1", "2"], tmp_path), Slots(None, ["0", "1", "2"], tmp_path)
    with slots.taken(2, [2, 0]) as taken:
        assert taken.gpus == ["2", "0"]
        with other.taken(1) as rest:
            assert rest.gpus == ["1"]


def test_several_are_taken_at_once_or_not_at_all(tmp_path: Path) -> None:
    """Two runs want both GPUs, and each could hold one: neither waits forever."""
    first, second = Slots(None, ["0", "1"], tmp_path), Slots(None, ["0", "1"], tmp_path)
    heard: list[str] = []
    with first.taken(1, holder={"stage": "demo/sft"}):
        waiting = threading.Thread(target=lambda: second.taken(2, on_wait=heard.append, keep_waiting=lambda: not done).__enter__())
        done: list[bool] = []
        waiting.start()
        while not heard:
            time.sleep(0.01)
        assert re.fullmatch(rf"waits for 2 of GPU 0, 1: 0 is held by demo/sft \(process {os.getpid()}, since \d\d:\d\d\)", heard[0])
        with first.taken(1) as taken:  # the GPU that the waiting run did not get is free for others
            assert taken.gpus == ["1"]
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_wait_ends_with_its_run(tmp_path: Path) -> None:
    slots = Slots(2, ["0"], tmp_path)
    with slots.taken(1), pytest.raises(StageFailed, match="stopped with the run") as error:
        slots.taken(1, keep_waiting=lambda: False).__enter__()
    assert error.value.final


HOLDER = """
import sys, time
from pathlib import Path
from flows.run.slots import Slots
with Slots(None, ["0"], Path(sys.argv[1])).taken(1, holder={"stage": "other/sft"}):
    print("has it", flush=True)
    time.sleep(1000)
"""


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "has it\n"
        slots = Slots(None, ["0"], tmp_path)
        assert slots.held_by_others(["0"])[0].startswith(f"0 is held by other/sft (process {holder.pid}, since ")
        holder.kill()
        holder.wait()
        with slots.taken(1) as taken:
            assert taken.gpus == ["0"]
    finally:
        holder.kill()
        holder.stdout.close()  # type: ignore[union-attr]


def test_one_stage_at_a_time_without_gpus(tmp_path: Path) -> None:
    slots = Slots(None, [], tmp_path)
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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("TUNELINE_GPUS", "2")
    assert visible_gpus() == ["0", "1"]


def test_a_pause_ends_with_the_run() -> None:
    supervisor = Supervisor()
    pausing = threading.Thread(target=supervisor.pause, args=(3600,), daemon=True)
    pausing.start()
    supervisor.stop()
    pausing.join(PATIENCE)
    assert not pausing.is_alive()


@pytest.mark.slow
def test_a_server_that_is_away_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    back = threading.Event()

    def hang(percent: float, description: str) -> None:
        asked.append(percent)
        back.wait(PATIENCE)

    monkeypatch.setattr(progress, "create_progress_artifact", hang)
    bar = progress.ProgressArtifact("sft")
    for step in range(1000):
        bar.show(Event(t=0, type="progress", step=step, total=1000))
    bar.close()
    assert not back.is_set()
    assert len(asked) == 1
    back.set()


def test_the_last_progress_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda percent, description: shown.append(percent) or "id")
    monkeypatch.setattr(progress, "update_progress_artifact", lambda artifact, percent, description: shown.append(percent))
    bar = progress.ProgressArtifact("sft")
    bar.show(Event(t=0, type="progress", step=10, total=100, message="x"))
    until(lambda: shown)
    bar.show(Event(t=0, type="progress", step=100, total=100, message="x"))
    bar.close()
    assert shown == [10.0, 100.0]


def test_updates_become_rarer_the_longer_a_stage_works() -> None:
    """Each update is an event that the server stores."""
    moment, updates = 0.0, 0
    while moment < 36_000:
        moment += progress.pause(moment, progress.SECONDS)
        updates += 1
        if moment < 3600:
            first_hour = updates
    assert 250 < first_hour < 320
    assert updates < 550


def test_a_server_of_ours_removes_runs_that_ended_before_the_history_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.server.services import ServerServicesDBVacuumSettings

    for history, days in (("30d", 30.0), ("12h", 0.5)):
        for name, value in kept(history).items():
            monkeypatch.setenv(name, value)
        settings = ServerServicesDBVacuumSettings()
        assert settings.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
        assert settings.retention_period.total_seconds() == days * 86400
    assert ServerServicesDBVacuumSettings.model_validate({"retention_period": float(kept("30m").popitem()[1])})
