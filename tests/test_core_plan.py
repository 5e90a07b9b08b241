"""Keys and plans: what changes a key and what does not, and the reason that a plan gives for every stage that would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneline import file_memory
from tuneline.errors import ConfigError
from tuneline.keys import canonical, key_of
from tuneline.load import load
from tuneline.plan import PlanRow, plan
from tuneline.runs import StageRecord
from tuneline.store import Base, Manifest
from tuneline.workspace import Workspace

PIPELINES = """\
version: 1
pipelines:
  demo:
    stages:
      base:   {kind: model, path: base}
      data:   {kind: dataset, model: base, sources: [{type: files, path: "rows/*.jsonl"}]}
      sft:    {kind: sft, model: base, dataset: data, lora: {r: 16}}
      merged: {kind: merge, adapters: [sft]}
      eval:   {kind: evaluate, model: merged, datasets: [data]}
      gate:   {kind: gate, require: [{metric: data/exact_match, of: eval, at_least: 0.5}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipelines.yaml").write_text(PIPELINES)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def planned(folder: Path, *sets: str, **options: Any) -> dict[str, PlanRow]:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", sets))
    return {row.stage: row for row in plan(workspace, "demo", **options)}


def build(folder: Path, *sets: str, payload: str = "1") -> dict[str, PlanRow]:
    """Publishes an artifact for every stage that would run, one after the other, and records the run."""
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", sets))
    record = workspace.runs.begin("demo", ())
    while True:
        rows = {row.stage: row for row in plan(workspace, "demo")}
        row = next((row for row in rows.values() if row.status == "run" and row.key), None)
        if row is None:
            break
        publish(workspace, row, rows, payload)
    for row in rows.values():
        fields = {"key": row.key, "document": row.document, "digest": row.artifact.digest if row.artifact else None}
        record.stages.append(StageRecord(stage=row.stage, kind=row.kind, status="done", **fields))
    workspace.runs.finish(record, "completed")
    return rows


def publish(workspace: Workspace, row: PlanRow, rows: dict[str, PlanRow], payload: str) -> None:
    stage = workspace.loaded.spec.pipelines["demo"].stages[row.stage]
    base = None
    if stage.gives() == "Adapter":
        model = rows["base"].artifact
        assert model is not None
        base = Base(kind="model", key=model.key, digest=model.digest, template=None)
    assert row.key is not None
    with workspace.store.locked(row.key):
        built = workspace.store.building(row.key)
        (built / "payload").mkdir()
        (built / "payload" / "data").write_text(f"{row.kind} {payload}")
        facts = {"parents": {}, "metrics": {}, "info": {}, "host": {}, "base": base, "document": row.document}
        workspace.store.publish(
            built, lambda digest, files: Manifest(kind=row.kind, type=stage.gives(), key=row.key or "", digest=digest, files=files, **facts)
        )


def reasons(rows: dict[str, PlanRow]) -> dict[str, list[str]]:
    return {name: [f"{reason.code}: {reason.text}" for reason in row.reasons] for name, row in rows.items() if row.reasons}


def test_a_first_plan_runs_everything_and_a_second_nothing(folder: Path) -> None:
    rows = planned(folder)
    assert {row.status for row in rows.values()} == {"run"}
    assert reasons(rows)["sft"] == ["input: base is built first", "input: data is built first", "never_ran: no run has completed it"]
    build(folder)
    after = planned(folder)
    assert {name: row.status for name, row in after.items()} == {**dict.fromkeys(after, "cached"), "gate": "run"}


def test_a_changed_field_runs_its_stage_and_what_hangs_on_it(folder: Path) -> None:
    build(folder)
    rows = planned(folder, "sft.lora.r=8")
    assert {name: row.status for name, row in rows.items()} == {
        "base": "cached", "data": "cached", "sft": "run", "merged": "run", "eval": "run", "gate": "run",
    }  # fmt: skip
    # 16 is the default, and defaults are not in the document
    assert reasons(rows) == {
        "sft": ["config: lora.r (default) -> 8"], "merged": ["input: sft is built first"], "eval": ["input: merged is built first"],
    }  # fmt: skip
    reason = rows["sft"].reasons[0]
    assert (reason.path, reason.old, reason.new) == ("lora.r", None, 8)


@pytest.mark.parametrize(
    "change",
    ["sft.resources.gpus=2", "sft.resources.micro_batch_size=1", "sft.retries=7", "sft.timeout=60", "sft.description=hello",
     "sft.needs=[data]", "sft.lora.r=16", "sft.seed=0", "sft.warmup_steps=0"],
)  # fmt: skip
def test_what_only_says_how_changes_no_key(folder: Path, change: str) -> None:
    before = {name: row.key for name, row in build(folder).items()}
    assert {name: row.key for name, row in planned(folder, change).items()} == before


@pytest.mark.parametrize("change", ["sft.seed=1", "sft.lora.use_dora=true", "sft.packing=true", "sft.learning_rate=1e-3"])
def test_what_changes_the_result_changes_the_key(folder: Path, change: str) -> None:
    before = build(folder)["sft"].key
    assert planned(folder, change)["sft"].key != before


def test_renaming_stages_and_moving_the_folder_change_no_key(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = {name: row.key for name, row in build(folder).items()}
    text = (
        PIPELINES.replace("sft", "tuned")
        .replace("kind: tuned", "kind: sft")
        .replace("data:", "corpus:")
        .replace("dataset: data", "dataset: corpus")
    )
    text = text.replace("datasets: [data]", "datasets: [corpus]").replace("data/", "corpus/").replace('"rows/*.jsonl"', "moved.jsonl")
    (folder / "pipelines.yaml").write_text(text)
    (folder / "rows" / "a.jsonl").rename(folder / "moved.jsonl")
    other = tmp_path_factory.mktemp("elsewhere") / "project"
    folder.rename(other)
    rows = planned(other)
    assert [rows[name].key for name in ("base", "corpus", "tuned", "merged", "eval")] == [
        before[name] for name in ("base", "data", "sft", "merged", "eval")
    ]


def test_an_edited_file_is_the_reason(folder: Path) -> None:
    build(folder)
    (folder / "rows" / "a.jsonl").write_text('{"text": "b"}\n')
    rows = planned(folder)
    assert rows["base"].status == "cached"
    assert reasons(rows)["data"] == ["file: the file of sources.0.path changed"]


def test_an_upstream_rebuilt_to_the_same_bytes_busts_nothing(folder: Path) -> None:
    build(folder)
    rows = build(folder, "base.seed=1")
    assert planned(folder, "base.seed=1")["sft"].status == "cached"
    assert rows["base"].key != planned(folder)["base"].key


def test_a_changed_upstream_is_the_reason(folder: Path) -> None:
    build(folder)
    workspace = Workspace(load(folder / "pipelines.yaml", "demo"))
    rows = {row.stage: row for row in plan(workspace, "demo", force=("data",))}
    publish(workspace, rows["data"], rows, "2")
    assert reasons(planned(folder))["sft"] == ["input: data changed"]


def test_missing_corrupt_and_forced_are_told_apart(folder: Path) -> None:
    built = build(folder)
    assert reasons(planned(folder, force=("sft",)))["sft"] == ["forced: asked for by --force"]
    artifact = built["sft"].artifact
    assert artifact is not None
    (artifact.payload / "data").write_text("")
    assert reasons(planned(folder))["sft"][0].startswith("corrupt: its artifact is broken: payload/data has 0 bytes")
    artifact.path.rename(folder / "gone")
    assert reasons(planned(folder))["sft"] == ["missing: its artifact is no longer in the store"]


def test_a_new_version_of_a_program_or_library_is_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setattr("tuneline.plan.program_version", lambda kind: 99 if kind == "merge" else 1)
    lock = folder / "torch.txt"
    lock.write_text("torch==9.0\n")
    (folder / "pipelines.yaml").write_text(PIPELINES.replace("pipelines:", "runtimes: {new: {lock: torch.txt}}\npipelines:", 1))
    rows = planned(folder, "sft.runtime=new")
    assert "library: torch 2.13.0 -> 9.0" in reasons(rows)["sft"]
    assert "code: tuneline's merge program changed" in reasons(rows)["merged"]


def test_a_missing_file_is_unknown_to_a_plan_with_its_place(folder: Path) -> None:
    (folder / "rows" / "a.jsonl").unlink()
    row = planned(folder)["data"]
    assert row.status == "unknown"
    assert "pipelines.yaml:6:" in str(row.problems[0])
    assert "found no file at" in str(row.problems[0])


def test_a_folder_in_the_place_of_rows_is_said_with_its_place(folder: Path) -> None:
    text = (folder / "pipelines.yaml").read_text()
    (folder / "pipelines.yaml").write_text(text.replace("rows/*.jsonl", "rows"))
    row = planned(folder)["data"]
    assert row.status == "unknown"
    assert f"found the folder {folder / 'rows'}, allowed a file or a glob\n\nhint: `rows/*.jsonl`, say" in str(row.problems[0])


def test_a_hub_branch_is_unknown_and_a_commit_is_known(folder: Path) -> None:
    text = PIPELINES.replace("path: base}", "hub: owner/name}")
    (folder / "pipelines.yaml").write_text(text)
    rows = planned(folder)
    assert {rows[name].status for name in ("base", "data", "sft", "merged", "eval")} == {"unknown"}
    (folder / "pipelines.yaml").write_text(text.replace("owner/name}", f"owner/name, revision: {'a' * 40}}}"))
    assert planned(folder)["base"].key is not None


def test_only_takes_the_ancestors_and_names_are_checked(folder: Path) -> None:
    assert list(planned(folder, only="sft")) == ["base", "data", "sft"]
    with pytest.raises(ConfigError, match="did you mean `merged`"):
        planned(folder, only="mergd")
    with pytest.raises(ConfigError, match="--force: found no stage `x`"):
        planned(folder, force=("x",))


def test_a_plan_changes_nothing_on_disk_but_remembered_digests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "TICK", -(10**12))  # also what was just written is remembered
    before = {path for path in folder.rglob("*")}
    planned(folder)
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {path.relative_to(folder).as_posix() for path in before}
    assert new == {".tuneline", ".tuneline/digests.json", ".tuneline/digests.lock"}


def test_a_key_is_the_hash_of_canonical_json() -> None:
    assert canonical({"b": 1, "a": [1.0, "é"]}) == '{"a":[1.0,"é"],"b":1}'
    assert key_of({"a": 1, "b": 2}) == key_of(json.loads('{"b": 2, "a": 1}'))
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})
