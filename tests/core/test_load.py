"""Loading valid pipelines files: types, variables, overrides, merge keys, outside paths, warnings, and files of a thousand stages."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from load_tools import GOOD, load_text

from tuneline.canonical import key_of
from tuneline.config.load import check, load
from tuneline.config.order import in_order, with_ancestors
from tuneline.config.yaml_source import parse
from tuneline.errors import ConfigError
from tuneline.planning.keys import key_document
from tuneline.planning.plan import plan
from tuneline.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


def test_a_good_file_loads_with_types_kept() -> None:
    pipeline = load_text(GOOD).spec.pipelines["demo"]
    assert pipeline.stages["sft"].lora.r == 16
    assert in_order(pipeline) == ["base", "data", "sft", "merged", "gptq", "eval", "gate"]
    assert with_ancestors(pipeline, "merged") == {"merged", "sft", "base", "data"}


@pytest.mark.parametrize("name", ["demo", "lora-sft"])
def test_the_shipped_pipelines_are_valid(name: str) -> None:
    assert load(ROOT / "pipelines.yaml").pipeline(name).stages


def test_overrides_change_what_they_name() -> None:
    sets = ("sft.resources.gpus=1", "data.sources.0.path=b.csv", "sft.learning_rate=3e-5", "gate.needs=[gptq]")
    stages = load_text(GOOD, "demo", sets, ("rank=4",)).spec.pipelines["demo"].stages
    assert (stages["sft"].lora.r, stages["sft"].resources.gpus, stages["sft"].learning_rate) == (4, 1, 3e-5)
    assert stages["data"].sources[0].path == "b.csv"
    assert stages["gate"].needs == ("gptq",)


def test_env_is_for_the_store_and_a_dollar_can_be_escaped() -> None:
    text = GOOD.replace("version: 1", 'version: 1\nstore: "${env:PLACE}/store"').replace("split: {test: 0.1}", 'system: "say $${x} $$${y}"')
    loaded = check(parse(text, "p.yaml"), Path("/project/p.yaml"), environment={"PLACE": "/big"})
    assert loaded.spec.store == "/big/store"
    assert loaded.spec.pipelines["demo"].stages["data"].system == "say ${x} $${y}"
    with pytest.raises(ConfigError, match="but PLACE is not set"):
        load_text(text)


def test_a_variable_inside_text_is_written_as_yaml_writes_it() -> None:
    text = GOOD.replace("rank: 16", "rank: 16, fast: true, rate: 1e-4").replace("split: {test: 0.1}", 'system: "${fast} ${rate} ${rank}"')
    assert load_text(text).spec.pipelines["demo"].stages["data"].system == "true 0.0001 16"


def test_merge_keys_give_way_to_what_stands_in_the_stage_and_to_its_places() -> None:
    text = GOOD.replace("merged: {kind: merge,", "merged: &m {kind: merge, dtype: float16, seed: 1,") + "      other: {<<: *m, seed: -2}\n"
    with pytest.raises(ConfigError, match=r"^p\.yaml:13:29: demo\.other\.seed: found -2, expected at least 0$"):
        load_text(text)
    other = load_text(text.replace("-2", "2")).spec.pipelines["demo"].stages["other"]
    assert (other.seed, other.dtype) == (2, "float16")


# --- places outside ---------------------------------------------------------------------------------------------------

INSIDE = [
    ("", "models/base"), ("", "./models/../base"), ("", "/project/base"), ("", "."), ("", "rows/*.jsonl"), ("", "..base"),
    ("roots: [/data]", "/data/base"), ("roots: [/data/]", "/data"), ("roots: [../shared]", "../shared/a/../base"),
    ("roots: [~/models]", "~/models/base"), ("roots: [/]", "/anywhere"), ('roots: ["."]', "base"), ("roots: [..]", "../x"),
]  # fmt: skip


@pytest.mark.parametrize(("roots", "path"), INSIDE)
def test_paths_inside_the_folder_or_a_root_are_allowed(roots: str, path: str) -> None:
    text = GOOD.replace("version: 1", f"version: 1\n{roots}").replace("models/base", f'"{path}"')
    assert load_text(text).spec.pipelines["demo"].stages["base"].path == path


def test_the_store_and_a_python_of_ones_own_may_be_anywhere() -> None:
    places = "version: 1\nstore: /big/store\nruntimes: {own: {python: ~/venv/bin/python}}"
    assert load_text(GOOD.replace("version: 1", places)).spec.store == "/big/store"


def test_roots_are_in_no_key() -> None:
    stages = [
        load_text(GOOD.replace("version: 1", head)).spec.pipelines["demo"].stages["base"]
        for head in ("version: 1", "version: 1\nroots: [/a]")
    ]
    assert len({key_of(key_document(stage, 1, {})) for stage in stages}) == 1


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x")
    (tmp_path / "project" / "p.yaml").write_text(
        "version: 1\npipelines: {p: {stages: {base: {kind: model, path: base}, d: {kind: dataset, sources: [{type: files, path: 'r*.jsonl'}]}}}}\n"
    )
    (tmp_path / "project" / "base" / "config.json").write_text("{}")
    (tmp_path / "project" / "rows.jsonl").write_text("{}\n")
    return tmp_path / "project"


def problems_of(file: Path) -> list[str]:
    return [str(problem) for row in plan(Workspace(load(file)), "p") for problem in row.problems]


@pytest.mark.parametrize("kind", ["file in a folder", "the folder", "a match of a glob"])
def test_a_link_that_leads_out_is_refused_unless_a_root_allows_it(project: Path, kind: str) -> None:
    link, target = {
        "file in a folder": (project / "base" / "weights", "../../elsewhere/secret"),
        "the folder": (project / "base", "../elsewhere"),
        "a match of a glob": (project / "rest.jsonl", project.parent / "elsewhere" / "secret"),
    }[kind]
    assert problems_of(project / "p.yaml") == []
    if link.is_dir():
        (link / "config.json").unlink()
        link.rmdir()
    link.symlink_to(target)
    elsewhere = project.parent / "elsewhere"
    (problem,) = problems_of(project / "p.yaml")
    leads_to = elsewhere if kind == "the folder" else elsewhere / "secret"
    assert f"found a link that leads out of the folder of the file: {link} -> {leads_to}\n" in problem
    assert problem.split(": ")[1] in ("p.base.path", "p.d.sources.0.path")
    hint = f"hint: if this is intended, add `roots: [{leads_to.parent}]` at the top of the file"
    assert problem.endswith(hint)
    file = project / "p.yaml"
    file.write_text(file.read_text().replace("version: 1", f"version: 1\nroots: [{leads_to.parent}]"))
    assert problems_of(file) == []


def test_links_that_stay_inside_are_followed(project: Path) -> None:
    """As in the hub's cache, where a snapshot's files are links into blobs/ beside it."""
    (project / "blobs").mkdir()
    (project / "base" / "config.json").rename(project / "blobs" / "abc")
    (project / "base" / "config.json").symlink_to("../blobs/abc")
    assert problems_of(project / "p.yaml") == []
    (project.parent / "way").symlink_to(project, target_is_directory=True)
    assert problems_of(project.parent / "way" / "p.yaml") == []  # the project's own folder reached through a link
    (project.parent / "elsewhere" / "linked.yaml").symlink_to(project / "p.yaml")
    text = "\n".join(problems_of(project.parent / "elsewhere" / "linked.yaml"))
    assert f"found no file at {project.parent / 'elsewhere' / 'base'}" in text  # paths are relative to the link's folder


def test_a_folder_with_glob_characters_in_its_name_works(project: Path) -> None:
    moved = project.rename(project.parent / "run [1] *")
    assert problems_of(moved / "p.yaml") == []


# --- warnings, size ---------------------------------------------------------------------------------------------------


def test_what_runs_foreign_code_is_warned_of_in_its_pipeline() -> None:
    text = GOOD.replace("path: models/base", "path: models/base, trust_remote_code: true") + GOOD.split("pipelines:\n")[1].replace(
        "demo", "other"
    )
    loaded = load_text(text)
    message = "p.yaml:6:67: demo.base.trust_remote_code: runs Python files that come with this model"
    assert [str(warning) for warning in loaded.warnings()] == [message]
    assert [str(warning) for warning in loaded.warnings("demo")] == [message]
    assert loaded.warnings("other") == []
    by_flag = load_text(GOOD, "demo", ("base.trust_remote_code=true",)).warnings()
    assert [warning.place for warning in by_flag] == ["--set base.trust_remote_code"]


def test_a_chain_of_a_thousand_stages_loads_at_once() -> None:
    stages = {f"s{i}": f"{{kind: model, path: m{i}, needs: [{f's{i + 1}' if i < 999 else ''}]}}" for i in range(1000)}
    text = "version: 1\npipelines:\n  long:\n    stages:\n" + "".join(f"      {name}: {stage}\n" for name, stage in stages.items())
    start = time.process_time()
    pipeline = load_text(text).spec.pipelines["long"]
    assert in_order(pipeline) == list(reversed(stages))
    assert len(with_ancestors(pipeline, "s0")) == 1000
    assert time.process_time() - start < 20
