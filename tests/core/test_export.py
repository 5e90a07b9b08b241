"""The kind `export`: messages of `validate`, what is in its key, and what is written from manifests."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from load_tools import GOOD, load_text
from plan_tools import PIPELINES, build, planned

from flows.run.export import export_stage, not_in_card
from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.workspace.cards import TO_BE_WRITTEN, author_text, is_export, with_author_text
from tuneline.workspace.history import manifests_in_history
from tuneline.workspace.recipe import recipe

HINT = "\n\nhint: "
REFUSED = {
    "evaluations": ("of: sft, evaluations: [gate]", "found `gate`, which gives a Verdict, expected a stage that gives a Report: eval"),
    "merge": ("of: merged, merge: true", f"merge: found merge, but `merged` gives a model, not an adapter{HINT}remove it"),
    "both": ("of: sft, merge: true, adapter_only: true", f"adapter_only: found adapter_only with merge, which leaves no adapter{HINT}remove one of them"),
    "dtype": ("of: gptq, dtype: float16", f"dtype: found float16, but the weights of `gptq` are quantized{HINT}remove it, or export the model that it was quantized from"),
    "shards": ("of: merged, max_shard_size: 1GB", f"max_shard_size: found max_shard_size without merge or dtype: weights are copied as they are{HINT}remove it"),
    "private": ("of: sft, private: false", f"private: found private without push: it has no effect{HINT}remove it, or name the repository: `push: owner/name`"),
    "push": ("of: sft, push: name", "push: found 'name', expected owner/name, as on the hub"),
    "token": ("of: sft, push: o/n, license: hf_" + "a" * 34, "license: found a token, expected none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        load_text(f"{GOOD}      given: {{kind: export, {fields}}}\n")
    assert f"demo.given.{message}" in str(error.value) or message in str(error.value)


def test_an_export_is_no_evaluation() -> None:
    with pytest.raises(ConfigError, match=r"evaluations.0: found `other`, which is not an evaluation"):
        load_text(f"{GOOD}      other: {{kind: export, of: sft}}\n      given: {{kind: export, of: sft, evaluations: [other]}}\n")


@pytest.fixture
def exporting(folder: Path) -> Path:
    (folder / "pipelines.yaml").write_text(f"{PIPELINES}      given:  {{kind: export, of: merged, evaluations: [eval]}}\n")
    return folder


def test_the_key_covers_how_the_model_was_made_and_the_names_in_its_card(exporting: Path) -> None:
    rows = build(exporting)
    document = rows["given"].document
    assert document is not None
    assert list(document["history"].values()) == ["base", "data", "sft", "merged", "eval"]
    assert "history" not in (rows["merged"].document or {})
    text = (exporting / "pipelines.yaml").read_text()
    for old, new in ((" data:  ", " rows:  "), ("[data]", "[rows]"), ("dataset: data", "dataset: rows"), ("data/ex", "rows/ex")):
        text = text.replace(old, new)
    (exporting / "pipelines.yaml").write_text(text)
    renamed = planned(exporting)
    assert {name: row.status for name, row in renamed.items() if row.status != "cached"} == {"given": "run", "gate": "run"}
    assert [reason.text for reason in renamed["given"].reasons] == ["its inputs were made in another way, or their stages have other names"]


def test_an_evaluation_that_is_not_built_is_named(exporting: Path) -> None:
    stages = load(exporting / "pipelines.yaml").pipeline("demo").stages
    built = {name: row.artifact for name, row in build(exporting).items() if row.artifact is not None}
    lacks = [not_in_card(stages, name, export_stage(stages, name, built, {})) for name in ("merged", "given")]
    assert lacks == [[], []]
    del built["eval"]
    assert not_in_card(stages, "merged", export_stage(stages, "merged", built, {})) == ["eval"]


def test_the_recipe_is_the_pipeline_as_it_ran(exporting: Path) -> None:
    rows = build(exporting, "sft.learning_rate=1e-5", "sft.lora.r=8")
    history = (rows["given"].document or {})["history"]
    assert rows["given"].artifact is not None
    manifests = manifests_in_history(history, rows["given"].artifact.path.parents[2])
    stages = yaml.safe_load(recipe(history, manifests))["pipelines"]["made"]["stages"]
    assert stages["sft"] == {"kind": "sft", "model": "base", "dataset": "data", "lora": {"r": 8}, "learning_rate": 1e-5, "dtype": "float32"}
    assert (stages["merged"], stages["eval"]["datasets"]) == ({"kind": "merge", "adapters": ["sft"]}, ["data"])
    assert stages["data"]["sources"][0]["path"].startswith(("sha256:", "2 files, the first sha256:"))
    (exporting / "again.yaml").write_text(recipe(history, manifests))
    assert list(load(exporting / "again.yaml").spec.pipelines["made"].stages) == ["base", "data", "sft", "merged", "eval"]


def test_an_authors_text_is_found_and_kept(tmp_path: Path) -> None:
    card = f"---\nlicense: mit\ntags:\n- tuneline\n---\n\n# m\n\n## Intended use\n\n{TO_BE_WRITTEN}\n\n## Data\n\nrows\n"
    (tmp_path / "README.md").write_text(card)
    assert is_export(tmp_path)
    assert author_text(card) is None
    text = "For tables.\n\n```sh\n## a comment\n```\n\n## Limits\n\nNone known."
    written = card.replace(TO_BE_WRITTEN, text)
    assert author_text(written) == text
    assert with_author_text(card, author_text(written)) == written
    for other in ("# tuneline\n\n- tuneline\n", "---\ntags:\n- tuneline-x\n---\n"):
        (tmp_path / "README.md").write_text(other)
        assert not is_export(tmp_path)
