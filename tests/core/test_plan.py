"""Keys and plans: what changes a key and what does not, and the reasons that a plan gives for stages to run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from plan_tools import PIPELINES, build, planned, publish

from tuneline.canonical import canonical, key_of
from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.kinds.stage import ComputingStage
from tuneline.planning.plan import PlanRow, plan, unpinned
from tuneline.trees import file_memory
from tuneline.workspace.hub_cache import HubCache
from tuneline.workspace.workspace import Workspace


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
        "base": "cached", "data": "cached", "sft": "run", "merged": "run or cached", "eval": "run or cached", "gate": "run",
    }  # fmt: skip
    # 16 is the default, and defaults are not in the document
    assert reasons(rows) == {
        "sft": ["config: lora.r (default) -> 8"], "merged": ["input: sft is built first"], "eval": ["input: merged is built first"],
    }  # fmt: skip
    reason = rows["sft"].reasons[0]
    assert (reason.path, reason.old, reason.new) == ("lora.r", None, 8)


@pytest.mark.parametrize(
    "change",
    ["sft.resources.processes=2", "merged.resources.gpus=1", "data.resources.gpus=1", "sft.resources.micro_batch_size=1", "sft.retries=7", "sft.timeout=60", "sft.description=hello",
     "sft.needs=[data]", "sft.lora.r=16", "sft.seed=0", "sft.warmup_steps=0"],
)  # fmt: skip
def test_what_only_says_how_changes_no_key(folder: Path, change: str) -> None:
    before = {name: row.key for name, row in build(folder).items()}
    assert {name: row.key for name, row in planned(folder, change).items()} == before


@pytest.mark.parametrize("change", ["sft.seed=1", "sft.lora.use_dora=true", "sft.packing=true", "sft.learning_rate=1e-3"])
def test_what_changes_the_result_changes_the_key(folder: Path, change: str) -> None:
    before = build(folder)["sft"].key
    assert planned(folder, change)["sft"].key != before


def test_what_auto_means_is_in_the_key_and_follows_from_the_file(folder: Path) -> None:
    """bfloat16 with GPUs, float32 without, in every kind that computes; the number of GPUs is not in the key."""
    (folder / "pipelines.yaml").write_text(
        PIPELINES.replace("gate:", "small: {kind: quantize, model: merged, calibration: data}\n      gate:", 1)
    )
    before = build(folder)
    for name, most in (("sft", 8), ("eval", 1), ("small", 1)):
        one, many, without = (planned(folder, f"{name}.resources.gpus={count}")[name] for count in (1, most, 0))
        assert one.key == many.key == planned(folder, f"{name}.dtype=bfloat16")[name].key != before[name].key
        assert without.key == planned(folder, f"{name}.resources.gpus=1", f"{name}.dtype=float32")[name].key == before[name].key
        assert reasons({name: one}) == {name: ["config: dtype float32 -> bfloat16"]}


def test_a_store_from_before_the_compute_type_was_in_keys_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts of unknown compute type are rebuilt. Artifacts that do not depend on it are kept."""
    with monkeypatch.context() as patch:
        patch.setattr(ComputingStage, "decided", lambda stage: {})
        old = build(folder)
    store = Workspace(load(folder / "pipelines.yaml", "demo")).store
    assert [store.verify(path) for path in store.artifacts()] == [None] * 5
    rows = planned(folder)
    assert {name for name, row in rows.items() if row.status == "cached"} == {"base", "data"}
    assert reasons(rows)["sft"] == ["config: dtype (default) -> float32"]
    build(folder)
    assert planned(folder)["merged"].key == old["merged"].key  # its input has the same bytes


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
    assert reasons(planned(folder, force=("sft",)))["sft"] == ["forced: requested by --force"]
    artifact = built["sft"].artifact
    assert artifact is not None
    (artifact.payload / "data").write_text("")
    assert reasons(planned(folder))["sft"][0].startswith("corrupt: its artifact is broken: payload/data has 0 bytes")
    artifact.path.rename(folder / "gone")
    assert reasons(planned(folder))["sft"] == ["missing: its artifact is no longer in the store"]


def test_a_new_version_of_a_program_or_library_is_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setattr("tuneline.planning.plan.program_version", lambda kind: 99 if kind == "merge" else 1)
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
    assert f"found the folder {folder / 'rows'}, expected a file or a glob\n\nhint: write `rows/*.jsonl`, for example" in str(
        row.problems[0]
    )


def test_a_hub_branch_is_unknown_and_a_commit_is_known(folder: Path) -> None:
    text = PIPELINES.replace("path: base}", "hub: owner/name}")
    (folder / "pipelines.yaml").write_text(text)
    rows = planned(folder)
    assert {rows[name].status for name in ("base", "data", "sft", "merged", "eval")} == {"unknown"}
    (folder / "pipelines.yaml").write_text(text.replace("owner/name}", f"owner/name, revision: {'a' * 40}}}"))
    assert planned(folder)["base"].key is not None


TASK_FILES = {
    "arc/easy.yaml": "task: easy\ndataset_path: owner/arc\ntag: [all_of_arc]\nprocess_docs: !function utils.docs\n",
    "arc/_hard": "dataset_path: owner/arc\ndataset_kwargs: {revision: v2}\ntag: all_of_arc\n",
    "arc/hard.yaml": "task: hard\ninclude: _hard\n",
    "group.yaml": "group: suite\ntask: [easy, coded, {group: more, task: [{task: easy, dataset_path: owner/other}, linked]}]\n",
    "coded.yaml": "task: coded\nclass: !function task.Coded\n",
    "linked.yaml": "task: linked\ndataset_path: json\ndataset_kwargs: {data_files: {test: 'https://host/rows.jsonl'}}\n",
    "broken.yaml": "task: [easy",
}
OWN_FILES = {
    "mine.yaml": "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n",
    "folder.yaml": "task: folder\ndataset_path: rows\n",
    "rows/x": "",
    "easy.yaml": "task: easy\ndataset_path: owner/mine\n",
}


class KnownHub(HubCache):
    """Resolves every repository to the commit that starts with `a`, or to another one."""

    letter = "a"

    def commit(self, repository_type: str, repository: str, revision: str) -> str:
        return (self.letter + f"{repository_type} {repository} {revision}").encode().hex().ljust(40, "0")[:40]


def test_data_of_benchmarks_is_pinned_by_its_commits(folder: Path) -> None:
    own = folder / "own"
    tasks = folder / "env" / "lib" / "python3.11" / "site-packages" / "lm_eval" / "tasks"
    for place, files in ((tasks, TASK_FILES), (own, OWN_FILES)):
        for name, text in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
    (folder / "env" / "bin").mkdir()
    (folder / "env" / "bin" / "python").symlink_to(sys.executable)

    def of_eval(fields: str, hub: HubCache, more: str = "runtimes: {here: {python: env/bin/python}}\n") -> tuple[PlanRow, list[str]]:
        stage = f"eval: {{kind: evaluate, runtime: here, model: base, {fields}}}\n"
        head = PIPELINES[: PIPELINES.index("      data:")].replace("pipelines:", f"{more}pipelines:")
        (folder / "pipelines.yaml").write_text(f"{head}      {stage}")
        workspace = Workspace(load(folder / "pipelines.yaml", "demo"), hub=hub)
        rows = {row.stage: row for row in plan(workspace, "demo")}
        publish(workspace, rows["base"], rows, "1") if rows["base"].artifact is None else None
        rows = {row.stage: row for row in plan(workspace, "demo")}
        return rows["eval"], [f"{problem.field}: {problem.message}" for problem in unpinned(workspace, "demo", list(rows.values()))]

    def commits(fields: str) -> set[str]:
        row, _ = of_eval(fields, KnownHub())
        assert row.document is not None
        return set(row.document["commits"])

    assert commits("benchmarks: [easy]") == {"benchmarks.0.owner/arc"}
    assert commits("benchmarks: [easy, hard]") == {"benchmarks.0.owner/arc", "benchmarks.1.owner/arc@v2"}
    assert commits("benchmarks: [all_of_arc]") == {"benchmarks.0.owner/arc", "benchmarks.0.owner/arc@v2"}
    assert commits("benchmarks: [suite]") == {"benchmarks.0.owner/arc", "benchmarks.0.owner/other"}
    assert commits("benchmarks: [mine, folder, easy], include_path: own") == {"benchmarks.2.owner/mine"}
    assert commits("benchmarks: [suite], include_path: own") == {"benchmarks.0.owner/mine", "benchmarks.0.owner/other"}

    place, says = "demo.eval.benchmarks.0", "its data is not in the cache key and may change"
    assert of_eval("benchmarks: [easy, human_eval], allow_code_execution: true", KnownHub())[1] == []
    assert of_eval("benchmarks: [suite]", KnownHub())[1] == [
        f"{place}: {says}: code of its own loads it", f"{place}: {says}: its files are on the network",
    ]  # fmt: skip
    assert of_eval("benchmarks: [none]", KnownHub())[1] == [f"{place}: {says}: lm-eval has no task file of this name"]

    one, other = KnownHub(), KnownHub()
    other.letter = "b"
    assert of_eval("benchmarks: [easy]", one)[0].key != of_eval("benchmarks: [easy]", other)[0].key
    offline = of_eval("benchmarks: [easy]", HubCache())[0]
    assert (offline.status, offline.reasons[0].text) == ("unknown", "owner/arc is looked up on the hub when a run starts")
    (folder / "some.txt").write_text("torch==1.0\n")
    absent = of_eval("benchmarks: [easy]", one, "runtimes: {here: {lock: some.txt}}\n")[0]
    assert (absent.status, absent.reasons[0].text) == ("unknown", "the data of its benchmarks is looked up on the hub when a run starts")


def test_only_takes_the_ancestors_and_names_are_checked(folder: Path) -> None:
    assert list(planned(folder, only="sft")) == ["base", "data", "sft"]
    with pytest.raises(ConfigError, match="did you mean `merged`"):
        planned(folder, only="mergd")
    with pytest.raises(ConfigError, match="--force: found no stage `x`"):
        planned(folder, force=("x",))


def test_a_plan_changes_nothing_on_disk_but_remembered_digests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_memory, "TICK", -(10**12))  # files that were just written are remembered too
    before = set(folder.rglob("*"))
    planned(folder)
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {path.relative_to(folder).as_posix() for path in before}
    assert new == {".tuneline", ".tuneline/digests.json", ".tuneline/digests.lock"}


def test_a_key_is_the_hash_of_canonical_json() -> None:
    assert canonical({"b": 1, "a": [1.0, "é"]}) == '{"a":[1.0,"é"],"b":1}'
    assert key_of({"a": 1, "b": 2}) == key_of(json.loads('{"b": 2, "a": 1}'))
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})
