"""The store, by the real command: damage, full and read-only disks, invalid folders, and `tuneline gc`. All folders here have names
with spaces and non-ASCII letters."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, until
from project import Project
from small_disk import read_only, small_disk

PIPELINES = """\
version: 1
store: störe mit Leer
runtimes: {stand-in: {python: bin/python}}
pipelines:
  p:
    parallel: 1
    stages:
      one: {kind: dataset, runtime: stand-in, sources: [{type: files, path: one.txt}]}
      two: {kind: dataset, runtime: stand-in, sources: [{type: files, path: two.txt}], needs: [one]}
"""
Script = Callable[..., None]
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    root = tmp_path / "prøjekt mit 雪"
    root.mkdir()
    monkeypatch.chdir(root)
    return Project(root)


@pytest.fixture
def p(project: Project, stand_in: Script) -> Project:
    project.write(PIPELINES)
    for name in ("one", "two"):
        project.write(name, f"{name}.txt")
    return project


@pytest.fixture
def disk(p: Project) -> Iterator[Path]:
    """The store on a separate disk of 4 MB."""
    with small_disk(p.root / "störe mit Leer", "4m") as folder:
        yield folder


def artifacts(run: dict[str, Any]) -> dict[str, Path]:
    return {stage["stage"]: Path(stage["artifact"]) for stage in run["stages"] if stage["artifact"]}


def statuses(run: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in run["stages"]}


def calls(project: Project, name: str) -> int:
    path = project.root / f"calls-{name}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def visible(store: Path) -> list[Path]:
    return [path for path in store.glob("[a-z]*/??/*") if path.is_dir()]


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.slow
def test_damage_is_found_at_the_next_hit_or_by_verify_and_built_again(project: Project, stand_in: Script) -> None:
    names = ("cut", "gone", "more", "flip")
    stages = "".join(
        f"      {name}: {{kind: dataset, runtime: stand-in, sources: [{{type: files, path: {name}.txt}}]}}\n" for name in names
    )
    project.write(PIPELINES[: PIPELINES.index("      one")] + stages)
    for name in names:
        project.write(name, f"{name}.txt")
    payload = {name: path / "payload" for name, path in artifacts(project.json("run", "p")).items()}
    assert project.tuneline("verify").stderr == "4 artifacts, 0 damaged\n"

    data = bytearray((payload["flip"] / "data.json").read_bytes())
    data[5] ^= 1
    (payload["flip"] / "data.json").write_bytes(data)
    assert [stage["status"] for stage in project.json("plan", "p")["stages"]] == ["cached"] * 4
    found = project.tuneline("verify", status=1)
    assert found.stdout == f"{payload['flip'].parent}: payload/data.json has changed since it was written\n"
    assert found.stderr.endswith("4 artifacts, 1 damaged\n")

    (payload["cut"] / "data.json").write_bytes(b"{")
    (payload["gone"] / "data.json").unlink()
    (payload["more"] / "another").write_bytes(b"")
    plan = {stage["stage"]: stage for stage in project.json("plan", "p")["stages"]}
    assert {name: plan[name]["status"] for name in names} == dict.fromkeys(names, "run")
    assert [plan[name]["reasons"][0]["code"] for name in names] == ["corrupt", "corrupt", "corrupt", "missing"]
    again = project.tuneline("run", "p", "--json")
    assert statuses(json.loads(again.stdout)) == dict.fromkeys(names, "done")
    store = project.root / "störe mit Leer"
    for name, problem in [
        ("cut", "data.json has 1 bytes instead of "),
        ("gone", "data.json is missing"),
        ("more", "another is not in its manifest"),
    ]:
        key = payload[name].parent.name
        assert re.search(
            rf"dataset/{key[:12]} in the store is broken: payload/{problem}.*; moved to .*dataset-{key}-.*; it is rebuilt when it is needed",
            again.stderr,
        )
    for name in names:
        assert len(list((store / ".quarantine").glob(f"dataset-{payload[name].parent.name}-*/payload"))) == 1
        assert calls(project, name) == 2
    assert project.tuneline("verify").stderr == "4 artifacts, 0 damaged\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("fill", r"disk: the disk of .* is full: the program had written 4\.\d MB there and needs more space; without them 4\.\d MB of 4\.2 MB are free"),
        ("brim", r"disk: .*\.building.*: No space left on device; 0 bytes of 4\.2 MB are free"),
    ],
)  # fmt: skip
def test_a_full_store(p: Project, stand_in: Script, disk: Path, action: str, said: str) -> None:
    """`fill`: the program hits the full disk and cannot write its failure; `brim`: the flow hits it when it writes the artifact."""
    fill(disk / "somebody else's")
    refused = p.tuneline("run", "p", status=2)
    assert refused.stderr.startswith(f"the disk of the store {disk} is full: 0 bytes are free\n\nhint: free space with `tuneline gc`")
    (disk / "somebody else's").unlink()

    stand_in(two=[action])
    failed = p.json("run", "p", status=1)
    assert statuses(failed) == {"one": "done", "two": "failed"}
    message = failed["stages"][1]["message"]
    assert re.match(said, message), message
    assert str(disk) in message
    assert "hint: free space with `tuneline gc`, or move to a larger disk (the store alone with `store:`)" in message
    assert calls(p, "two") == 1  # trying again would not help
    assert visible(disk) == [artifacts(failed)["one"]]
    assert list((disk / ".building").iterdir()) == []
    assert p.tuneline("verify").stderr == "1 artifacts, 0 damaged\n"
    assert statuses(p.json("run", "p")) == {"one": "cached", "two": "done"}


def test_a_full_workspace(p: Project) -> None:
    """There is no space for run records, logs and Prefect's database."""
    with small_disk(p.root / ".tuneline", "20m") as home:
        fill(home / "filler")
        failed = p.tuneline("run", "p", status=2)
        assert failed.stderr == (
            f"the disk of {home} is full: 0 bytes are free, a run needs 16.8 MB for its records\n\n"
            "hint: free some space; `tuneline gc` does if the store is on the same disk\n"
        )
        assert p.tuneline("gc").stderr == "0 bytes freed, 0 of 0 removed\n"


@pytest.mark.slow
def test_a_workspace_that_fills_up_while_a_run_goes_on(p: Project, stand_in: Script) -> None:
    """Checkpoints fill the disk: there is no space for logs, records or Prefect's database until the run deletes its ballast file."""
    stand_in(two=["hoard"])
    with small_disk(p.root / ".tuneline", "40m") as home:
        failed = p.tuneline("run", "p", "--json", status=1, PREFECT_API_URL="")
        assert "Traceback" not in failed.stderr
        run = json.loads(failed.stdout)
        assert statuses(run) == {"one": "done", "two": "failed"}
        assert run["stages"][1]["message"].startswith(f"disk: the disk of {home}/work/")
        assert p.json("show", "p")["state"] == "failed"
        (hoard,) = home.glob("work/*/big")
        hoard.unlink()
        assert statuses(p.json("run", "p", PREFECT_API_URL="")) == {"one": "cached", "two": "done"}


@pytest.mark.slow
def test_a_read_only_store_is_read(p: Project) -> None:
    run = p.json("run", "p")
    store = p.root / "störe mit Leer"
    with read_only(store):
        assert {stage["status"] for stage in p.json("plan", "p")["stages"]} == {"cached"}
        assert p.json("show", "p/one")["key"] == run["stages"][0]["key"]
        assert p.tuneline("verify").stderr == "2 artifacts, 0 damaged\n"
        for server in ({}, {"PREFECT_API_URL": ""}):
            assert statuses(p.json("run", "p", **server)) == {"one": "cached", "two": "cached"}
        assert p.json("gc", "--dry-run")["freed"] == 0
        refused = p.tuneline("run", "p", "--force", "one", status=2)
        message = f"the store {store} cannot be written: Read-only file system\n\nhint: mount it writable, or name another `store:`\n"
        assert refused.stderr == message
    artifact = artifacts(run)["one"]
    (artifact / "payload" / "data.json").write_bytes(b"\0" * (artifact / "payload" / "data.json").stat().st_size)
    with read_only(store):
        found = p.tuneline("verify", status=1)
        assert found.stdout == f"{artifact}: payload/data.json has changed since it was written\n"
        assert f"{artifact} stays where it is: the store {store} cannot be written: Read-only file system" in found.stderr
    (artifact / "payload" / "data.json").unlink()
    with read_only(store):
        assert p.json("plan", "p")["stages"][0]["reasons"][0]["code"] == "corrupt"
        assert p.tuneline("run", "p", status=2).stderr == message


def a_file(store: Path) -> None:
    store.write_text("")


def newer(store: Path) -> None:
    store.mkdir()
    (store / "store.json").write_text('{"schema": 2, "layout": "flat"}')


def damaged(store: Path) -> None:
    store.mkdir()
    (store / "store.json").write_text("")


WRONG = [
    (a_file, "the store {store} is a file, expected a folder\n\nhint: name another `store:`\n"),
    (newer, "the store {store} was made by a newer tuneline (store schema 2, this one reads 1)\n\nhint: upgrade tuneline, or name another `store:`\n"),
    (damaged, "{store}/store.json is damaged\n\nhint: delete it if that folder is a store: the next run writes it again\n"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[make.__name__ for make, _ in WRONG])
@pytest.mark.parametrize("command", [["run", "p"], ["plan", "p"], ["verify"], ["gc"], ["gc", "--dry-run"], ["show", "p"]], ids=" ".join)
def test_what_is_no_store_of_ours_is_refused(p: Project, make: Callable[[Path], None], message: str, command: list[str]) -> None:
    store = p.root / "störe mit Leer"
    make(store)
    result = p.tuneline(*command, status=2)
    assert (result.stdout, result.stderr) == ("", message.format(store=store))


def test_a_store_whose_disk_is_not_mounted_is_not_made_anew(p: Project) -> None:
    p.write(PIPELINES.replace("store: störe mit Leer", "store: nowhere/store"))
    result = p.tuneline("run", "p", status=2)
    assert result.stderr == (
        f"found no folder {p.root}/nowhere, in which to create the store `store`\n\n"
        "hint: create it, mount its disk, or name another `store:`\n"
    )
    assert not (p.root / "nowhere").exists()
    assert [stage["status"] for stage in p.json("plan", "p")["stages"]] == ["run", "run"]


def test_an_artifact_of_a_newer_tuneline_is_left_alone(p: Project) -> None:
    key = p.json("plan", "p")["stages"][0]["key"]
    folder = p.root / "störe mit Leer" / "dataset" / key[:2] / key
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"schema": 9}')
    for command in (["plan", "p"], ["run", "p"], ["verify"], ["gc"]):
        result = p.tuneline(*command, status=2)
        assert result.stderr == (
            f"{folder} was written by a newer tuneline (store schema 9, this one reads 1)\n\n"
            "hint: upgrade tuneline, or name another `store:`\n"
        )
    assert folder.is_dir()


@pytest.mark.slow
def test_gc_removes_what_no_kept_run_needs_and_show_says_so(p: Project) -> None:
    old = p.json("run", "p")
    p.write("one more", "one.txt")
    new = p.json("run", "p")
    assert p.json("gc")["freed"] == 0  # three runs are kept
    p.json("run", "p")
    store = p.root / "störe mit Leer"
    foretold = p.json("gc", "--keep-last", "1", "--dry-run")
    assert len(visible(store)) == 3
    assert foretold["dry_run"]
    table = p.tuneline("gc", "--keep-last", "1")
    assert re.search(r"^dataset +[0-9a-f]{12} +\d\.\d kB +\d+ s +p/one +removed +no kept run needs it *$", table.stdout, re.M), table.stdout
    assert re.search(r"^dataset +[0-9a-f]{12} +\d\.\d kB +\d+ s +p/two +kept +run \S+, one of the last 1 *$", table.stdout, re.M)
    assert re.fullmatch(r"\d+\.\d kB freed, 1 of 3 removed\n", table.stderr)
    assert [Path(item["path"]) for item in foretold["items"] if item["removed"]] == [artifacts(old)["one"]]
    assert sorted(visible(store)) == sorted(artifacts(new).values())
    assert p.json("gc", "--keep-last", "1")["freed"] == 0

    shown = p.tuneline("show", "p", "--run", old["run_id"])
    assert re.search(r"^one  .*  \(no longer in the store\)$", shown.stdout, re.M)
    assert re.search(r"^two  .*[0-9a-f]$", shown.stdout, re.M)
    assert "no longer in the store" in p.tuneline("show", "p/one", "--run", old["run_id"]).stdout
    assert p.json("show", "p", "--run", old["run_id"])["stages"]["one"] is None
    p.write("one", "one.txt")
    stages = p.json("plan", "p")["stages"]
    assert [stage["status"] for stage in stages] == ["run", "cached"]


@pytest.mark.slow
def test_gc_does_not_disturb_a_run_that_goes_on(p: Project, stand_in: Script) -> None:
    """The first stage is done, the next one runs; no run of another pipeline keeps anything."""
    stand_in(two=["wait"])
    process = p.start("run", "p", "--json")
    until((p.root / "waiting-two").exists, process)
    p.write("changed", "one.txt")  # so that the file of today does not keep it
    items = {item["kind"]: item for item in p.json("gc", "--keep-last", "1")["items"]}
    assert not any(item["removed"] for item in items.values())
    assert items["dataset"]["why"] == "p is running now"
    assert items["building"]["why"] == "being built"
    assert items["work"]["why"].startswith("unfinished")
    p.write("", "go")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert set(statuses(json.loads(out)).values()) == {"done"}


def test_gc_calls_that_are_wrong(p: Project) -> None:
    assert p.tuneline("gc", "--older-than", "soon", status=2).stderr == (
        "--older-than: found 'soon', expected a whole number of hours, days or weeks: 12h, 30d, 2w\n"
    )
    assert "Invalid value for '--keep-last': 0 is not in the range x>=1" in p.tuneline("gc", "--keep-last", "0", status=2).stderr
    assert p.tuneline("gc").stderr == "0 bytes freed, 0 of 0 removed\n"
