"""Outside inputs of a stage: read once, remembered by their stat, and read again when they change."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuneline.config.load import load
from tuneline.files import sha256
from tuneline.kinds.sources import CodeSource
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.inputs import SHA256, ResolvedInputs, _of_folder, resolve
from tuneline.planning.plan import plan
from tuneline.trees import file_memory, licenses
from tuneline.trees import select as source_tree
from tuneline.trees.file_memory import FileMemory, Look, Reading
from tuneline.trees.select import select
from tuneline.workspace.workspace import Workspace

PIPELINE = """version: 1
pipelines:
  p:
    stages:
      base: {kind: model, path: base}
      code: {kind: dataset, model: base, sources: [{type: code, path: around/tree, licenses: [MIT]}, {type: files, path: "rows/*.jsonl"}]}
"""
FILES = {
    "base/config.json": "{}", "base/deep/weights": "w", "rows/a.jsonl": "{}",
    "around/.git/HEAD": "", "around/LICENSE": "SPDX-License-Identifier: MIT",
    "around/tree/.gitignore": "out/\n", "around/tree/a.py": "x = 1\n", "around/tree/deep/b.py": "y = 1\n", "around/tree/deep/bin.py": "\0",
    "around/tree/out/c.py": "z = 1\n",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.yaml").write_text(PIPELINE)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for path in tmp_path.rglob("*"):  # in the past: on older kernels a change within 4 ms does not change the stat
        os.utime(path, (1e9, 1e9))
    return tmp_path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat files that were just written as old."""
    monkeypatch.setattr(file_memory, "TICK", -(10**12))


def resolved(folder: Path) -> dict[str, ResolvedInputs]:
    workspace = Workspace(load(folder / "p.yaml"))
    stages = {name: stage for name, stage in workspace.loaded.pipeline("p").stages.items() if isinstance(stage, ProgramStage)}
    found = {name: resolve(workspace, stage, workspace.hub.commit) for name, stage in stages.items()}
    workspace.memory.save()
    return found


# --- how often ------------------------------------------------------------------------------------------------------------

WATCHED = {"open", "os.scandir", "os.listdir", "os.rename"}
events: list[tuple[str, str]] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if events is not None and event in WATCHED:
        events.append((event, str(arguments[1 if event == "os.rename" else 0])))


@pytest.fixture(scope="module")
def audit() -> None:
    sys.addaudithook(note)  # an audit hook cannot be removed


@pytest.fixture
def watched(audit: None) -> Iterator[Callable[[], Counter[tuple[str, str]]]]:
    """Return what was opened, listed or renamed since the last call."""
    global events
    events = []

    def taken() -> Counter[tuple[str, str]]:
        global events
        assert events is not None
        found, events = Counter(events), []
        return found

    yield taken
    events = None


@pytest.mark.usefixtures("settled")
def test_a_plan_lists_each_folder_and_reads_each_file_once_and_writes_its_memory_once(
    folder: Path, watched: Callable[[], Counter[tuple[str, str]]]
) -> None:
    tree, memory = str(folder / "around" / "tree"), str(folder / ".tuneline" / "digests.json")
    read = [str(folder / name) for name in FILES if "out/" not in name and ".git" not in name]

    def planned() -> Counter[tuple[str, str]]:
        workspace = Workspace(load(folder / "p.yaml"))
        watched()
        plan(workspace, "p")
        found = watched()
        listed = {name.rstrip("/"): count for (event, name), count in found.items() if event in ("os.scandir", "os.listdir")}
        assert {name: count for name, count in listed.items() if name.startswith(tree)} == {tree: 1, f"{tree}/deep": 1}
        return found

    cold = planned()
    assert {name: cold["open", name] for name in read} == dict.fromkeys(read, 1)
    assert cold["os.rename", memory] == 1
    warm = planned()
    assert {name: warm["open", name] for name in read} == dict.fromkeys(read, 0)
    assert warm["os.rename", memory] == 0, "nothing is new"


@pytest.mark.usefixtures("settled")
def test_a_look_afterwards_opens_and_lists_nothing_of_a_tree(folder: Path, watched: Callable[[], Counter[tuple[str, str]]]) -> None:
    found = resolved(folder)
    watched()
    assert all(inputs.unchanged() for inputs in found.values())
    assert {name for _, name in watched()} == {str(folder / "rows")}, "a glob is matched again"


# --- what changed ---------------------------------------------------------------------------------------------------------


def edit_unseen(file: Path) -> None:
    """Write other content of the same size and keep the mtime."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
        file.write_bytes(bytes(byte ^ 3 for byte in file.read_bytes()))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": lambda p: (p / "around/tree/a.py").write_text("x = 2\n"),
    "edited, with its time put back": lambda p: edit_unseen(p / "around/tree/deep/b.py"),
    "of a folder, edited": lambda p: edit_unseen(p / "base/deep/weights"),
    "of a glob, edited": lambda p: edit_unseen(p / "rows/a.jsonl"),
    "no longer binary": lambda p: (p / "around/tree/deep/bin.py").write_text("b = 1\n"),
    "added to a tree": lambda p: (p / "around/tree/deep/n.py").write_text("n = 1\n"),
    "added to a folder": lambda p: (p / "base/deep/more").write_text("m"),
    "added to a glob": lambda p: (p / "rows/b.jsonl").write_text("{}"),
    "removed from a tree": lambda p: (p / "around/tree/deep/b.py").unlink(),
    "removed from a folder": lambda p: shutil.rmtree(p / "base/deep"),
    "renamed": lambda p: (p / "around/tree/a.py").rename(p / "around/tree/z.py"),
    "now ignored": lambda p: (p / "around/tree/.gitignore").write_text("out/\na.py\n"),
    "no longer ignored": lambda p: (p / "around/tree/.gitignore").unlink(),
    "ignored from above": lambda p: (p / "around/.gitignore").write_text("a.py\n"),
    "of a repository inside": lambda p: (p / "around/tree/deep/.git").mkdir(),
    "of another license": lambda p: (p / "around/tree/deep/LICENSE").write_text("SPDX-License-Identifier: ISC"),
}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_a_key_is_noticed_by_stat(folder: Path, change: Callable[[Path], object]) -> None:
    before = resolved(folder)
    assert all(inputs.unchanged() for inputs in before.values())
    change(folder)
    after = resolved(folder)
    moved = {name for name in before if after[name].digests != before[name].digests}
    assert len(moved) == 1
    assert {name for name in before if not before[name].unchanged()} >= moved
    shutil.rmtree(folder / ".tuneline")
    assert {name: inputs.digests for name, inputs in resolved(folder).items()} == {name: after[name].digests for name in after}


@pytest.mark.usefixtures("settled")
def test_what_lies_above_a_tree_is_noticed(folder: Path) -> None:
    license, above, git = (folder / "around" / name for name in ("LICENSE", ".gitignore", ".git"))
    before = resolved(folder)["code"]
    edit_unseen(license)
    assert not before.unchanged()
    # Without a list of licenses, parent folders are not listed.
    (folder / "p.yaml").write_text(PIPELINE.replace(", licenses: [MIT]", ""))
    for change in (lambda: above.write_text("*.js\n"), lambda: edit_unseen(above), above.unlink, lambda: git.rename(folder / "git")):
        before = resolved(folder)["code"]
        assert before.unchanged()
        change()
        assert not before.unchanged()


@pytest.mark.usefixtures("settled")
def test_a_touched_file_has_the_content_that_it_had(folder: Path) -> None:
    before = resolved(folder)
    for name in ("around/tree/a.py", "base/deep/weights", "rows/a.jsonl"):
        os.utime(folder / name)
    after = resolved(folder)
    for name, inputs in before.items():
        assert not inputs.unchanged()
        assert after[name].digests == inputs.digests
        assert after[name].facts != inputs.facts, "somebody wrote: a program that read meanwhile may have read anything"


@pytest.mark.usefixtures("settled")
def test_what_is_left_out_may_change_as_it_likes(folder: Path) -> None:
    before = resolved(folder)
    (folder / "around/tree/out/c.py").write_text("other")
    (folder / "around/tree/out/d.py").write_text("more")
    assert all(inputs.unchanged() for inputs in before.values())


@pytest.mark.usefixtures("settled")
def test_a_link_that_leads_elsewhere_now_is_noticed(folder: Path) -> None:
    (folder / "base/link").symlink_to("deep/weights")
    (folder / "base/broken").symlink_to("../later")
    before = resolved(folder)["base"]
    assert [entry["name"] for entry in before.digests["path"]] == ["config.json", "deep/weights", "link"]
    (folder / "later").write_text("l")
    assert not before.unchanged()
    before = resolved(folder)["base"]
    assert [entry["name"] for entry in before.digests["path"]] == ["broken", "config.json", "deep/weights", "link"]
    (folder / "other").write_text("o")
    (folder / "base/link").unlink()
    (folder / "base/link").symlink_to("../other")
    assert not before.unchanged()


@pytest.mark.usefixtures("settled")
def test_a_linked_folder_is_read_once_and_what_python_leaves_is_not(folder: Path) -> None:
    (folder / "templates").mkdir()
    (folder / "templates/tool.jinja").write_text("t")
    (folder / "base/more").symlink_to("../templates")
    (folder / "base/again").symlink_to("..")  # a link to itself
    (folder / "base/__pycache__").mkdir()
    (folder / "base/__pycache__/x.pyc").write_text("c")
    (folder / "base/.hidden").write_text("h")
    before = resolved(folder)["base"]
    names = [entry["name"] for entry in before.digests["path"]]
    assert "more/tool.jinja" in names
    assert not [name for name in names if "again/base" in name or "pycache" in name or "hidden" in name]
    (folder / "templates/tool.jinja").write_text("T")
    assert not before.unchanged()


def test_benchmarks_of_ones_own_may_read_hidden_files(folder: Path) -> None:
    look, workspace = Look(FileMemory(folder / "none.json")), Workspace(load(folder / "p.yaml"))
    (folder / "own/.data").mkdir(parents=True)
    (folder / "own/.data/rows.jsonl").write_text("{}")
    assert [entry["name"] for entry in _of_folder(workspace, str(folder / "own"), True, look)[1]] == [".data/rows.jsonl"]


def test_a_file_that_changes_while_it_is_hashed_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch, settled: None) -> None:
    real, file = SHA256.of, folder / "rows/a.jsonl"

    def writes_meanwhile(path: str) -> str:
        digest = real(path)
        if Path(path) == file:
            file.write_text("[]")
        return digest

    monkeypatch.setattr("tuneline.planning.inputs.SHA256", replace(SHA256, of=writes_meanwhile))
    before = resolved(folder)["code"]
    monkeypatch.undo()
    assert not before.unchanged()
    assert resolved(folder)["code"].digests["sources.1.path"][0]["sha256"] == sha256(file), "what was learned is not of this stat"


# --- the memory -----------------------------------------------------------------------------------------------------------


def test_what_was_written_a_moment_ago_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two edits within one tick of a file system's clock leave the same stat."""
    clock, real = os.stat(folder / "p.yaml").st_ctime_ns, file_memory.facts_of
    monkeypatch.setattr(file_memory, "facts_of", lambda status: (real(status)[0], clock, clock, real(status)[3]))
    file = folder / "rows/a.jsonl"

    def sees_an_edit(now: int) -> bool:
        monkeypatch.setattr(file_memory.time, "time_ns", lambda: now)
        before = resolved(folder)["code"]
        file.write_text("[]" if file.read_text() == "{}" else "{}")
        noticed, after = not before.unchanged(), resolved(folder)["code"]
        right = after.digests["sources.1.path"][0]["sha256"] == sha256(file)
        assert noticed == right
        return right

    assert sees_an_edit(clock - 10**10), "a file of the future"
    assert sees_an_edit(clock)
    assert sees_an_edit(clock + file_memory.TICK)
    assert not sees_an_edit(clock + file_memory.TICK + 1), (
        "long after the tick no edit could have kept the stat: the planted clock is to blame"
    )


def test_a_large_file_is_told_of_before_it_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "LARGE", 1000)
    reading, calls = Reading("size", "1", lambda path: calls.append("read") or 1), list[str]()
    memory = FileMemory(tmp_path / "digests.json")
    memory.say = calls.append
    for name, size in (("small", 999), ("large", 1000)):
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, ns=(1, 1))
    monkeypatch.setattr(file_memory, "settled", lambda facts, began: True)
    for _ in range(2):
        look = Look(memory)
        for name in ("small", "large"):
            look.read(reading, str(tmp_path / name), look.file(str(tmp_path / name)))
    assert calls == ["read", f"reading {tmp_path / 'large'}, 1.0 kB; the result is remembered for the next time", "read"]


def test_threads_and_processes_share_one_memory(tmp_path: Path, settled: None) -> None:
    """Each thread has its own FileMemory, as separate processes do."""
    files = [tmp_path / f"{i}.txt" for i in range(200)]
    for file in files:
        file.write_text(file.name)
    place = tmp_path / "memory" / "digests.json"
    memories = [FileMemory(place) for _ in range(4)]

    def digest(number: int) -> str:
        memory = memories[number % 4]
        look, file = Look(memory), str(files[number])
        found = look.read(SHA256, file, look.file(file))
        memory.save()
        return str(found)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(digest, range(len(files))))
    assert found == [sha256(file) for file in files]
    never = replace(SHA256, of=lambda file: pytest.fail(f"{file} is read again"))
    look = Look(FileMemory(place))
    assert [look.read(never, str(file), look.file(str(file))) for file in files] == found
    assert {file.name for file in place.parent.iterdir()} == {"digests.json", "digests.lock"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"sha256 ": []}', '{"sha256 ": {"%(file)s": 3}}', '{"%(file)s": [2, 1, 1, "old"]}']
)
def test_a_damaged_memory_and_one_of_an_earlier_tuneline_cost_only_time(folder: Path, content: str, settled: None) -> None:
    expected = {name: inputs.digests for name, inputs in resolved(folder).items()}
    memory = folder / ".tuneline/digests.json"
    memory.write_text(content.replace("%(file)s", str(folder / "rows/a.jsonl")))
    assert {name: inputs.digests for name, inputs in resolved(folder).items()} == expected
    resolved(folder)
    assert len(json.loads(memory.read_bytes())) == 3, "it is whole again: digests, texts and licenses"


def test_other_fields_of_a_source_are_answered_from_the_same_memory(folder: Path, settled: None) -> None:
    memory, tree = FileMemory(folder / "digests.json"), folder / "around/tree"
    (tree / "gpl.py").write_text("# SPDX-License-Identifier: GPL-3.0-only\n")

    def chosen(reading: FileMemory, **fields: Any) -> tuple[list[str], dict[str, int]]:
        selection = select(tree, CodeSource(type="code", path="tree", **fields), Look(reading))
        return list(selection.files), dict(selection.left_out)

    for fields in ({}, {"licenses": ("MIT",)}, {"licenses": ("GPL-3.0-only",)}, {"include": ("gpl.*",)}, {"exclude": ("deep",)}):
        assert chosen(memory, **fields) == chosen(FileMemory(folder / "none.json"), **fields), fields


def test_other_rules_answer_anew_and_take_the_place_of_the_old_ones(folder: Path, monkeypatch: pytest.MonkeyPatch, settled: None) -> None:
    before = resolved(folder)["code"]
    assert "a.py" in [entry["name"] for entry in before.digests["sources.0.path"]]

    def strict(file: str) -> tuple[str, str | None, str | None]:
        return "", "a rule of a newer tuneline" if file.endswith("a.py") else None, None

    monkeypatch.setattr(source_tree, "TEXT", Reading("text", "newer", strict))
    after = resolved(folder)["code"]
    assert after.trees["sources.0.path"].left_out["a rule of a newer tuneline"] == 1
    sections = json.loads((folder / ".tuneline/digests.json").read_bytes())
    assert [section for section in sections if section.startswith("text ")] == ["text newer"]


def test_an_edit_of_the_rules_is_another_name_in_the_memory(tmp_path: Path) -> None:
    assert source_tree.TEXT.rules == "".join(file_memory.digest_of_code(module.__file__) for module in (source_tree, licenses))
    edited = tmp_path / "source_tree.py"
    edited.write_text(Path(source_tree.__file__).read_text() + "LARGEST = 2\n")
    assert file_memory.digest_of_code(str(edited)) not in source_tree.TEXT.rules
