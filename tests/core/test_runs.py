"""Run records report whether a run is alive, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tuneline.workspace.runs import SCHEMA, Runs, StageRecord


def killed_run(folder: Path) -> str:
    """Begin a run in another process and kill it; return the run's id. The run counts as alive until then."""
    script = f"""
import sys
from pathlib import Path
from tuneline.workspace.runs import Runs
record = Runs(Path({str(folder)!r})).begin("demo", ())
print(record.run_id, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        record = Runs(folder).get("demo", run_id)
        assert (record.state, Runs(folder).alive(record)) == ("running", True)
        process.send_signal(signal.SIGKILL)
    return run_id


def test_a_killed_run_is_read_as_killed_and_the_next_writes_it_down(tmp_path: Path) -> None:
    runs, run_id = Runs(tmp_path), killed_run(tmp_path)
    file = tmp_path / f"{run_id}.json"
    record = runs.get("demo", run_id)
    assert (record.state, record.finished, runs.alive(record)) == ("killed", None, False)
    assert json.loads(file.read_text())["state"] == "running"  # reading changes nothing
    other = runs.begin("demo", ())
    assert json.loads(file.read_text())["state"] == "killed"
    assert [path.stem for path in tmp_path.glob("*.lock")] == [other.run_id]
    runs.finish(other, "completed")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{run_id}.json", f"{other.run_id}.json"])


def test_a_run_of_this_process_is_alive_until_it_is_finished(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = runs.begin("demo", ())
    assert runs.alive(record)
    assert Runs(tmp_path).get("demo", None).state == "running"
    Runs(tmp_path).begin("demo", ())  # another run does not mark it as killed either
    assert runs.alive(record)
    runs.finish(record, "failed")
    assert not runs.alive(record)
    assert runs.get("demo", record.run_id).state == "failed"


@pytest.mark.parametrize("schema", [1, 4])
@pytest.mark.parametrize(("state", "read"), [("completed", "completed"), ("running", "killed")])
def test_records_of_older_schemas_are_read(tmp_path: Path, schema: int, state: str, read: str) -> None:
    stage = {"stage": "one", "kind": "dataset", "status": "done", "key": "k", "digest": "d", "document": {"a": 1}, "artifact": "/a"}
    stage |= {"seconds": 1.5, "metrics": {"rows": 3.0}, "message": ""}
    if schema == 4:
        stage |= {"attempts": 2, "started": None}
    old = {"schema": schema, "run_id": "20261101T000000Z-abcd", "pipeline": "demo", "overrides": ["one.seed=2"], "stages": [stage]}
    old |= {"started": "2026-11-01T00:00:00+00:00", "finished": None, "state": state}
    (tmp_path / "20261101T000000Z-abcd.json").write_text(json.dumps(old))
    record = Runs(tmp_path).get("demo", None)
    assert (record.state, record.stages[0].metrics) == (read, {"rows": 3.0})
    assert Runs(tmp_path).last_success("demo", {"one"})["one"].document == {"a": 1}


def test_a_lock_without_a_record_is_swept(tmp_path: Path) -> None:
    (tmp_path / "20261101T000000Z-abcd.lock").touch()
    runs = Runs(tmp_path)
    record = runs.begin("demo", ())
    assert (record.schema_number, os.listdir(tmp_path).count("20261101T000000Z-abcd.lock")) == (SCHEMA, 0)
    runs.finish(record, "completed")


def working(key: str, ago: float) -> StageRecord:
    """Return a stage whose second attempt began `ago` seconds ago, after one of ten seconds."""
    started = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
    return StageRecord(stage="one", kind="sft", status="running", key=key, started=started, attempts=2, seconds=10)


def test_a_stage_at_work_has_its_time_until_now_or_until_its_run_was_killed(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    record = runs.begin("demo", ())
    record.stages = [working("k", 300)]
    runs.save(record)
    (stage,) = Runs(tmp_path / "runs").get("demo", None).stages
    assert (stage.status, stage.attempts, stage.seconds) == ("running", 2, pytest.approx(310, abs=5))

    work = tmp_path / "work" / "k"
    work.mkdir(parents=True)
    (work / "log.txt").touch()
    last = (datetime.now(UTC) - timedelta(seconds=100)).timestamp()
    os.utime(work / "log.txt", (last, last))
    os.close(runs._locks.pop(record.run_id))  # as the kernel does when its process dies
    killed = Runs(tmp_path / "runs").get("demo", None)
    (stage,) = killed.stages
    assert (killed.state, stage.status, stage.attempts, stage.seconds) == ("killed", "killed", 2, pytest.approx(210, abs=1))
    assert Runs(tmp_path / "runs").last_success("demo", {"one"}) == {}

    runs.finish(runs.begin("demo", ()), "completed")  # writes the final state of the other run
    (work / "log.txt").touch()  # by another run
    assert Runs(tmp_path / "runs").get("demo", record.run_id).stages[0].seconds == pytest.approx(210, abs=1)


def test_a_stage_that_waits_for_a_retry_has_no_running_time_and_ends_with_its_run(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    record = runs.begin("demo", ())
    record.stages = [working("k", 300).model_copy(update={"started": None})]
    runs.save(record)
    (stage,) = Runs(tmp_path / "runs").get("demo", None).stages
    assert (stage.status, stage.seconds) == ("running", 10)
    work = tmp_path / "work" / "k"
    work.mkdir(parents=True)
    (work / "events.jsonl").write_text('{"t": 1.0, "type": "progress", "step": 30, "total": 40}\n')
    os.close(runs._locks.pop(record.run_id))  # as the kernel does when its process dies
    reader = Runs(tmp_path / "runs")
    for _ in range(2):
        (stage,) = reader.get("demo", record.run_id).stages
        assert (stage.status, stage.seconds, stage.message) == ("killed", 10, "reached step 30 of 40")
        (work / "events.jsonl").unlink(missing_ok=True)  # by another run; the same reader has read how the stage ended
    assert reader.read("../runs") is None


def test_of_a_killed_stage_that_wrote_nothing_no_time_is_known(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    record = runs.begin("demo", ())
    record.stages = [working("k", 300)]
    runs.finish(record, "cancelled")
    assert (record.stages[0].status, record.stages[0].seconds, record.stages[0].message) == ("cancelled", 10, "")


def test_of_a_killed_stage_the_last_step_is_told(tmp_path: Path) -> None:
    """The last attempt counts, even if the kill cut off a line."""
    work = tmp_path / "work" / "k"
    work.mkdir(parents=True)
    now = datetime.now(UTC).timestamp()
    last = f'{{"t": {now - 200}, "type": "progress", "step": 12, "total": 40, "message": "loss 1"}}\n'

    def last_message() -> str:
        runs = Runs(tmp_path / "runs")
        record = runs.begin("demo", ())
        record.stages = [working("k", 300)]
        runs.finish(record, "killed")
        return record.stages[0].message

    assert last_message() == ""
    (work / "events.jsonl").write_text(f'{{"t": {now - 400}, "type": "progress", "step": 30, "total": 40}}\n')  # an earlier attempt
    assert last_message() == ""
    with (work / "events.jsonl").open("a") as file:
        file.write(last + f'{{"t": {now - 190}, "type": "metric", "name": "loss", "value": 1.0}}\n{{"t": {now - 180}, "ty')
    assert last_message() == "reached step 12 of 40"


def test_runs_of_one_second_are_in_the_order_of_their_starts(tmp_path: Path) -> None:
    runs, began = Runs(tmp_path), []
    for _ in range(5):
        began.append(runs.begin("demo", ()).run_id)
        time.sleep(0.002)  # ids tell milliseconds apart
    assert [record.run_id for record in runs.newest_first()] == began[::-1]


def test_threads_that_save_a_record_at_the_same_moment_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The stages of a run, and its end."""
    runs = Runs(tmp_path)
    record = runs.begin("demo", ())
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(lambda: [runs.save(record) for _ in range(20)]) for _ in range(8)]:
            done.result()
    assert [path.name for path in tmp_path.glob("*.json")] == [f"{record.run_id}.json"]
