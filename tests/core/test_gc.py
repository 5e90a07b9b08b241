"""What `tuneline gc` keeps and removes, in examples and for random stores and runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import small_disk

from tuneline.config.load import load
from tuneline.errors import ConfigError, StoreError
from tuneline.planning.gc import Item, Policy, age, collect
from tuneline.workspace.artifact import Base, Manifest
from tuneline.workspace.runs import RunRecord, RunState, StageRecord
from tuneline.workspace.store import Store
from tuneline.workspace.workspace import Workspace

FILE = "version: 1\npipelines: {p: {stages: {d: {kind: dataset, sources: [{type: files, path: none.jsonl}]}}}}\n"


def key(number: int) -> str:
    return f"{number:064x}"


class House:
    """A workspace, with artifacts and runs by number."""

    def __init__(self, root: Path, store: Path | None = None):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        (root / "pipelines.yaml").write_text(FILE + (f"store: {store}\n" if store else ""))
        self.workspace = Workspace(load(root / "pipelines.yaml"))
        self.workspace.prepare_store()
        self.store, self.runs = self.workspace.store, self.workspace.runs
        self.runs.folder.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self.warnings: list[str] = []

    def artifact(self, number: int, parents: tuple[int, ...] = (), base: int | None = None) -> Path:
        with self.store.locked(key(number)):
            built = self.store.staging_dir(key(number))
            (built / "payload").mkdir()
            (built / "payload" / "data").write_bytes(b"x" * 1000)
            facts = {"document": {}, "metrics": {}, "info": {}, "host": {}, "kind": "dataset", "type": "Dataset", "key": key(number)}
            inputs = {f"input.{i}": f"dataset/{key(parent)}" for i, parent in enumerate(parents)}
            of = Base(kind="dataset", key=key(base), digest="", template=None) if base is not None else None
            return self.store.publish(
                built, lambda digest, files: Manifest(digest=digest, files=files, parents=inputs, base=of, **facts)
            ).path

    def run(self, *numbers: int, pipeline: str = "p", state: RunState = "completed", days: float = 100) -> RunRecord:
        """Each run is newer than the last."""
        self._count += 1
        started = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        stages = [StageRecord(stage=f"s{number}", kind="dataset", status="done", key=key(number)) for number in numbers]
        record = RunRecord(run_id=f"20200101T{self._count:06}Z-abcd", pipeline=pipeline, started=started, state=state, stages=stages)
        self.runs.save(record)
        return record

    def left(self) -> set[int]:
        return {int(path.name, 16) for path in self.store.artifacts()}

    def collect(self, keep_last: int = 1, dry_run: bool = False, **options: object) -> list[Item]:
        return collect(self.workspace, Policy(keep_last, **options), dry_run, self.warnings.append)  # type: ignore[arg-type]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "prøject")


def test_what_a_kept_run_was_made_from_is_kept_far_back_and_an_adapters_base_too(house: House) -> None:
    house.artifact(1)
    house.artifact(2, (1,))
    house.artifact(3)
    house.artifact(4, (2,), base=3)
    house.artifact(5)
    house.run(1, 2, 3, 4, 5)
    house.run(4)
    house.run(4)
    items = {item.key: item for item in house.collect(keep_last=2)}
    assert house.left() == {1, 2, 3, 4}
    assert items[key(5)].removed
    assert items[key(5)].why == "no kept run needs it"
    assert items[key(5)].used_by == "p/s5"
    assert items[key(5)].size > 1000
    assert items[key(1)].why == f"dataset/{key(2)[:12]} was made from it"
    assert items[key(4)].why == "run 20200101T000003Z-abcd, one of the last 2"
    assert not any((house.store.root / ".trash").iterdir())


def test_the_last_runs_of_each_pipeline_are_kept_and_the_last_that_completed(house: House) -> None:
    for number in range(1, 9):
        house.artifact(number)
    house.run(1)
    house.run(2, pipeline="q")
    house.run(3)
    house.run(4, state="refused")
    house.run(5, state="refused")
    house.run(6, state="refused")
    house.collect(keep_last=2)
    assert house.left() == {2, 3, 5, 6, 7, 8}  # 7 and 8: no run names them
    house.collect(keep_last=1, everything=True)
    assert house.left() == {2, 3, 6}


@pytest.mark.parametrize("state", ["failed", "cancelled", "killed"])
def test_what_has_not_completed_yet_is_kept_until_it_has(house: House, state: RunState) -> None:
    for number in range(1, 5):
        house.artifact(number)
    house.run(1)
    house.run(2, state=state)
    house.run(3, state=state)
    house.collect()
    assert house.left() == {1, 2, 3, 4}
    house.run(4)
    house.collect()
    assert house.left() == {4}


def test_younger_runs_are_kept(house: House) -> None:
    for number in (1, 2, 3):
        house.artifact(number)
    house.run(1, days=40)
    house.run(2, days=20)
    house.run(3, days=1)
    items = house.collect(older_than=timedelta(days=30))
    assert house.left() == {2, 3}
    assert {item.key: item.why for item in items}[key(2)] == "run 20200101T000002Z-abcd, younger than 30 d"


def test_a_pipeline_that_is_running_is_left_alone(house: House) -> None:
    for number in (1, 2, 3):
        house.artifact(number)
    house.run(1)
    house.run(2)
    house.run(3, pipeline="q")
    going = house.runs.begin("p", ())
    house.collect()
    assert house.left() == {1, 2, 3}
    house.runs.finish(going, "completed")
    house.collect()
    assert house.left() == {3}  # the newest completed run needed nothing


def test_what_the_file_of_today_takes_is_kept_without_any_run(house: House) -> None:
    from tuneline.planning.plan import plan

    (house.root / "none.jsonl").write_text("x")
    (house.root / "python").write_text("#!/bin/sh\nexec " + os.sys.executable + ' "$@"\n')  # type: ignore[attr-defined]
    (house.root / "python").chmod(0o755)
    text = FILE.replace("kind: dataset,", "kind: dataset, runtime: own,") + "runtimes: {own: {python: python}}\n"
    (house.root / "pipelines.yaml").write_text(text)
    house.workspace = Workspace(load(house.root / "pipelines.yaml"))
    wanted = plan(house.workspace, "p")[0].key
    assert wanted
    house.artifact(int(wanted, 16))
    house.artifact(1)
    items = house.collect(everything=True)
    assert house.left() == {int(wanted, 16)}
    assert {item.key: item.why for item in items}[wanted] == "needed by pipelines.yaml: p/d"


def test_what_is_being_built_is_left_alone(house: House) -> None:
    house.artifact(1)
    house.artifact(2)
    house.run(1)
    house.run(2)
    with house.store.locked(key(1)):
        house.store.staging_dir(key(1))
        items = {item.kind: item for item in house.collect()}
        assert house.left() == {1, 2}
        assert items["building"].why == "being built"
    items = {item.kind: item for item in house.collect()}
    assert items["building"].removed
    assert house.left() == {2}
    assert not any((house.store.root / ".building").iterdir())


def test_old_records_go_once_they_name_nothing_that_is_left(house: House) -> None:
    for number in (1, 2, 3):
        house.artifact(number)
    old = [house.run(1, days=200), house.run(2, days=150), house.run(3, days=120)]
    young, newest = house.run(3, days=80), house.run(3, days=100)
    (house.runs.folder / f"{old[0].run_id}.html").write_text("report")
    (house.store.folder("dataset", key(2)) / "payload" / "data").touch()
    foretold = {item.key: item.why for item in house.collect(dry_run=True) if item.kind == "record"}
    assert foretold == {record.run_id: "ended, older than 90 d (`history`)" for record in old}
    assert {record.run_id for record in house.runs.every()} == {record.run_id for record in [*old, young, newest]}
    items = {item.key: item for item in house.collect() if item.kind == "record"}
    assert items.keys() == foretold.keys()
    assert items[old[0].run_id].used_by == "p"
    assert house.left() == {3}
    assert {path.name for path in house.runs.folder.iterdir()} == {f"{record.run_id}.json" for record in (young, newest)}
    assert not [item for item in house.collect() if item.removed]


def test_a_record_stays_that_alone_says_whose_an_artifact_is(house: House) -> None:
    house.artifact(1)
    house.artifact(2, (1,))
    first, kept = house.run(1, days=300), house.run(2, days=200)
    assert not [item for item in house.collect() if item.removed]  # 2 was made from 1
    assert [record.run_id for record in house.runs.every()] == [kept.run_id, first.run_id]


def test_a_store_of_two_workspaces(tmp_path: Path) -> None:
    one, two = House(tmp_path / "one", tmp_path / "store"), House(tmp_path / "two", tmp_path / "store")
    for number in (1, 2, 3, 4):
        one.artifact(number)
    one.run(1, 2)
    one.run(4)
    two.run(2, 3)
    two.run()
    items = {item.key: item for item in one.collect()}
    assert one.left() == {2, 3, 4}
    assert items[key(2)].why == f"{tmp_path}/two uses it"
    one.collect(everything=True)
    assert one.left() == {2, 3, 4}
    (tmp_path / "two").rename(tmp_path / "moved")
    one.warnings.clear()
    one.collect()
    assert len(one.warnings) >= 1
    assert one.warnings[0].startswith(f"found no folder {tmp_path}/two, which also uses this store: what its runs need is unknown")


def test_an_unreadable_record_stops_it(house: House) -> None:
    house.artifact(1)
    house.run(1)
    (house.runs.folder / "20200101T000000Z-abcd.json").write_text("{")
    with pytest.raises(StoreError, match=r"000000Z-abcd\.json cannot be read: what that run needs is unknown"):
        house.collect()
    assert house.left() == {1}


def test_an_artifact_of_a_newer_tuneline_stops_it(house: House) -> None:
    path = house.artifact(1) / "manifest.json"
    house.run(1)
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "schema": 99}))
    with pytest.raises(StoreError, match="newer tuneline"):
        house.collect()


def test_leftovers_go_and_unfinished_work_only_by_age(house: House) -> None:
    root = house.store.root
    for name in (".trash/x", ".building/" + key(1), ".quarantine/dataset-x"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_bytes(b"x" * 5000)
    work = house.root / ".tuneline" / "work" / key(2)
    work.mkdir(parents=True)
    (work.parent / ".half deleted").mkdir()
    assert {item.kind for item in house.collect(dry_run=True) if item.removed} == {"trash", "building", "quarantine"}
    house.collect()
    assert [any((root / name).iterdir()) for name in (".trash", ".building", ".quarantine")] == [False, False, False]
    assert list(work.parent.iterdir()) == [work]
    house.collect(older_than=timedelta(days=30))
    assert work.is_dir()
    with house.store.locked(key(2)):
        os.utime(work, (time.time() - 31 * 86400,) * 2)
        house.collect(older_than=timedelta(days=30))
        assert work.is_dir()
    os.utime(work, (time.time() - 31 * 86400,) * 2)
    (root / ".quarantine" / "young").mkdir()
    house.collect(older_than=timedelta(days=30))
    assert list(work.parent.iterdir()) == []
    assert (root / ".quarantine" / "young").is_dir()


def test_folders_that_are_no_artifacts_are_not_touched(tmp_path: Path) -> None:
    """With `store: .`, other folders are kept."""
    house = House(tmp_path / "mine", tmp_path / "mine")
    for name in ("photos/ab/holiday", f"photos/ab/{'c' * 64}", "data/cd/" + "cd" * 31):
        (tmp_path / "mine" / name).mkdir(parents=True)
    assert list(house.store.artifacts()) == []
    house.collect(everything=True)
    assert (tmp_path / "mine" / "photos" / "ab" / "holiday").is_dir()


def test_a_kill_in_the_middle_leaves_whole_artifacts_only(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 6):
        house.artifact(number)
    house.run(1, 2, 3, 4)
    house.run(5)

    def killed(path: Path, ignore_errors: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tuneline.planning.gc.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            house.collect()
    assert all(house.store.verify(folder) is None for folder in house.store.artifacts())
    house.collect()
    assert house.left() == {5}
    assert not any((house.store.root / ".trash").iterdir())


def test_what_a_run_notes_while_gc_waits_for_it_is_kept(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run starts to use an artifact between listing and removal."""
    house.artifact(1)
    house.artifact(2)
    house.run(1)
    house.run(2)
    try_lock = Store.try_lock

    def late(store: Store, name: str) -> object:
        if name == key(1) and "late" not in [record.pipeline for record in house.runs.every()]:
            house.run(1, pipeline="late", days=0)
        return try_lock(store, name)

    monkeypatch.setattr(Store, "try_lock", late)
    items = {item.key: item for item in house.collect()}
    assert house.left() == {1, 2}
    assert not items[key(1)].removed


def test_it_works_on_a_disk_without_a_byte_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "store", "1m") as folder:
        house = House(tmp_path / "mine", folder)
        for number in (1, 2):
            house.artifact(number)
        house.run(1)
        house.run(2)
        with contextlib.suppress(OSError), (folder / "else").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        house.collect()
        assert house.left() == {2}
        assert shutil.disk_usage(folder).free > 1000


def test_removal_waits_for_a_run_that_is_just_taking_something(house: House) -> None:
    with house.store.shared_lock():
        descriptor = os.open(house.store.root / ".locks" / "removal", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    with house.store.exclusive_lock():
        pass


@pytest.mark.parametrize(("text", "days"), [("30d", 30), ("12h", 0.5), ("2w", 14), ("0d", 0)])
def test_ages(text: str, days: float) -> None:
    assert age(text) == timedelta(days=days)


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5d", "30 days", "1m", "999999d", "٣d"])
def test_no_ages(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a whole number of hours, days or weeks: 12h, 30d, 2w"):
        age(text)


NUMBERS = st.integers(0, 7)
ARTIFACTS = st.lists(st.tuples(st.frozensets(NUMBERS, max_size=3), st.none() | NUMBERS), min_size=1, max_size=8)
RUNS = st.lists(
    st.tuples(
        st.frozensets(NUMBERS, max_size=4),
        st.sampled_from(["p", "q"]),
        st.sampled_from(["completed", "failed", "refused", "cancelled", "killed"]),
        st.integers(0, 60),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARTIFACTS, RUNS, st.integers(1, 3), st.sampled_from([None, 30]), st.booleans())
def test_for_any_store_and_runs(
    tmp_path_factory: pytest.TempPathFactory,
    artifacts: list[tuple[frozenset[int], int | None]],
    runs: list[tuple[frozenset[int], str, RunState, int]],
    keep_last: int,
    days: int | None,
    everything: bool,
) -> None:
    """Kept runs lose nothing that they need; a dry run predicts the real one; a second gc finds nothing to remove."""
    house = House(tmp_path_factory.mktemp("house"))
    made_from: dict[int, set[int]] = {}
    for number, (parents, base) in enumerate(artifacts):
        earlier = tuple(parent for parent in sorted(parents) if parent < number)
        base = base if base is not None and base < number else None
        house.artifact(number, earlier, base)
        made_from[number] = {*earlier, *([base] if base is not None else [])}
    ordered = sorted(runs, key=lambda run: -run[3])
    for numbers, pipeline, state, old in ordered:
        house.run(*numbers, pipeline=pipeline, state=state, days=old)
    options = {"keep_last": keep_last, "older_than": timedelta(days=days) if days else None, "everything": everything}

    foretold = [(item.key, item.why, item.removed) for item in house.collect(dry_run=True, **options)]  # type: ignore[arg-type]
    assert house.left() == set(made_from)
    assert [(item.key, item.why, item.removed) for item in house.collect(**options)] == foretold  # type: ignore[arg-type]
    left = house.left()
    assert left == set(made_from) - {int(name, 16) for name, _, removed in foretold if removed}

    needed: set[int] = set()
    for name in ("p", "q"):
        newest_first = [run for run in reversed(ordered) if run[1] == name]
        last_completed = next((i for i, run in enumerate(newest_first) if run[2] == "completed"), len(newest_first))
        for i, (numbers, _, state, old) in enumerate(newest_first):
            unfinished = i < last_completed and state != "refused"
            if i < keep_last or i == last_completed or unfinished or (days and old < days):
                needed |= numbers
    waiting = list(needed)
    for number in waiting:
        waiting += [parent for parent in made_from.get(number, ()) if parent not in waiting]
    named = {number for numbers, *_ in runs for number in numbers}
    assert left == set(made_from) & (set(waiting) | (set() if everything else set(made_from) - named))
    for folder in house.store.artifacts():
        assert house.store.verify(folder) is None

    assert not any(item.removed for item in house.collect(**options))  # type: ignore[arg-type]


def test_a_run_never_loses_what_it_has_written_down(house: House) -> None:
    """A run looks up, records and uses an artifact while gc runs in a loop and removes unused artifacts."""
    house.artifact(1)
    house.run(1, days=10)  # its record stays
    house.run()
    ended = threading.Event()
    removed: list[Item] = []

    def clean() -> None:
        while not ended.is_set():
            removed.extend(item for item in house.collect() if item.removed and item.kind == "dataset")

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for i in range(2000):
            if i >= 60 and removed:  # on a busy machine, gc may find no free lock for a while
                break
            record = house.runs.begin(f"q{i}", ())
            with house.store.shared_lock():
                artifact = house.store.find("dataset", key(1))
                if artifact:
                    time.sleep(0.005)
                    record.stages = [StageRecord(stage="s", kind="dataset", status="cached", key=key(1))]
                    house.runs.save(record)
            if artifact is None:
                house.artifact(1)
            else:
                time.sleep(0.02)
                assert artifact.payload.is_dir(), f"gone in round {i}"
            house.runs.finish(record, "completed")
            (house.runs.folder / f"{record.run_id}.json").unlink()
    finally:
        ended.set()
        cleaner.join()
    assert removed
