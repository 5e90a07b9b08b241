"""Artifacts that were tampered with, or built wrong: the stage that is given one ends with a message that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from silent_tools import World, edit_weights, refused

from tasks.data.rows import SPLITS, read_rows, write_rows
from tuneline.workspace.protocol import Failure, Input, Result

# --- artifacts that were tampered with --------------------------------------------------------------------------------


def rewrite(file: Path, old: str, new: str) -> None:
    """In place, of the same size."""
    text = file.read_text(encoding="utf-8")
    assert old in text
    assert len(old) == len(new)
    file.write_text(text.replace(old, new), encoding="utf-8")


def edit_template(world: World, kind: str) -> None:
    rewrite(world.artifacts[kind].payload / "chat_template.jinja", "assistant", "Assistant")


def base_in_place_of_merged(world: World) -> None:
    """Same names, same sizes; with the base's older times, as `cp -p` has it."""
    base, merged = (world.artifacts[kind].payload / "model.safetensors" for kind in ("model", "merge"))
    assert base.stat().st_size == merged.stat().st_size
    merged.unlink()
    shutil.copy2(base, merged)


def another_artifact(world: World) -> None:
    target = world.artifacts["merge"].path
    shutil.rmtree(target)
    shutil.copytree(world.artifacts["model"].path, target)


def edit_manifest(world: World, **fields: Any) -> None:
    file = world.artifacts["merge"].path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def alpha(world: World) -> None:
    rewrite(world.artifacts["sft"].payload / "adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 4')


def other_rows(world: World) -> None:
    """Calibration from other data: the train split in another order, so of the same size or another."""
    file = world.artifacts["dataset"].payload / "train.parquet"
    write_rows(read_rows(file)[::-1], file)


CHANGED = "has changed since it was written"
TAMPERED: list[tuple[str, str, Callable[[World], Any], str]] = [
    ("the template of an adapter edited", "evaluate", lambda w: edit_template(w, "sft"), rf"data: model: /.*/payload: chat_template\.jinja {CHANGED}"),
    ("the template of a merged model edited", "quantize", lambda w: edit_template(w, "merge"), rf"data: model: /.*/payload: chat_template\.jinja {CHANGED}"),
    ("the template of a base edited", "sft", lambda w: edit_template(w, "model"), rf"data: model: /.*/payload: chat_template\.jinja {CHANGED}"),
    ("the template of a base edited", "dataset", lambda w: edit_template(w, "model"), rf"data: model: /.*/payload: chat_template\.jinja {CHANGED}"),
    ("the base of an adapter edited", "evaluate", lambda w: edit_template(w, "model"), rf"data: model's base: /.*/payload: chat_template\.jinja {CHANGED}"),
    ("the base in place of the merged model", "quantize", base_in_place_of_merged, rf"data: model: /.*/payload: model\.safetensors {CHANGED}"),
    ("another artifact in place of the merged model", "quantize", another_artifact, "data: model: /.*/payload: its manifest belongs to model/"),
    ("a manifest of another template", "quantize", lambda w: edit_manifest(w, template="0" * 64), "data: model: /.*/payload: its manifest.json has been edited"),
    ("a manifest of another file", "quantize", lambda w: edit_manifest(w, files=[]), "data: model: /.*/payload: payload/chat_template.jinja is not in its manifest"),
    ("a file missing", "merge", lambda w: (w.artifacts["sft"].payload / "tokenizer.json").unlink(), "data: adapters.0: /.*: payload/tokenizer.json is missing"),
    ("another alpha", "merge", alpha, rf"data: adapters.0: /.*/payload: adapter_config\.json {CHANGED}"),
    ("calibration from other data", "quantize", other_rows, r"data: calibration: /.*/payload: (payload/)?train\.parquet has "),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "plant", "message"), [row[1:] for row in TAMPERED], ids=[f"{row[0]}-{row[1]}" for row in TAMPERED])
def test_an_artifact_that_was_tampered_with_is_noticed(
    world: World, tmp_path: Path, kind: str, plant: Callable[[World], Any], message: str
) -> None:
    mine = world.copy(tmp_path / "store")
    plant(mine)
    found = mine.run(tmp_path / "run", kind)
    refused(found, message)
    assert isinstance(found, Failure)
    assert "tuneline verify" in found.hint


def test_a_request_for_another_artifact_is_noticed(world: World, tmp_path: Path) -> None:
    """The base's folder under the merged model's digest."""
    inputs = world.inputs("quantize")
    inputs["model"] = world.input("model").model_copy(update={"digest": world.input("merge").digest})
    refused(world.run(tmp_path, "quantize", inputs=inputs), "data: model: /.*: found the artifact with digest .{12}, expected .{12}")


def test_what_was_only_copied_or_touched_is_used(world: World, tmp_path: Path) -> None:
    mine = world.copy(tmp_path / "store")
    for file in mine.artifacts["sft"].payload.iterdir():
        file.touch()
    assert isinstance(mine.run(tmp_path / "run", "evaluate"), Result)


# --- artifacts that were built wrong ----------------------------------------------------------------------------------


@pytest.fixture
def wrong(world: World, tmp_path: Path) -> Callable[..., Input]:
    """An artifact as of `kind`, its payload edited before it was published: complete, but wrong."""

    def build(kind: str, edit: Callable[[Path], None]) -> Input:
        built = tmp_path / "built"
        shutil.copytree(world.artifacts[kind].path, built)
        (built / "manifest.json").unlink()
        edit(built / "payload")
        mine = world.copy(tmp_path / "store")
        manifest = world.artifacts[kind].manifest
        result = Result(metrics=manifest.metrics, info={"template": manifest.template})
        mine.artifacts[kind] = mine.publish(built, kind, result)
        return mine.input(kind)

    return build


def leak(payload: Path) -> None:
    """Every test row among those to train on."""
    rows = [row for split in SPLITS for row in read_rows(payload / f"{split}.parquet")]
    write_rows(rows, payload / "train.parquet")


def zero(payload: Path) -> None:
    edit_weights(payload / "adapter_model.safetensors", lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])


def rename(part: str) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name.replace("base_model.model.", "base_model.")] = tensors.pop(name)

    return lambda payload: edit_weights(payload / "adapter_model.safetensors", edit)


LEAKED = r"data: \d+ groups of rows are in the dataset's \w+ split and in its \w+ split, such as \w+"
WRONG: list[tuple[str, str, str, str, Callable[[Path], None], str]] = [
    ("test rows among those to train on", "sft", "dataset", "dataset", leak, LEAKED),
    ("test rows among those to train on", "evaluate", "datasets.0", "dataset", leak, LEAKED),
    ("test rows among those to train on", "quantize", "calibration", "dataset", leak, LEAKED),
    ("B is zero", "merge", "adapters.0", "sft", zero, "bug: the adapter changes nothing: logits with and without it are the same"),
    ("B is zero", "evaluate", "model", "sft", zero, "bug: the adapter changes nothing: logits with and without it are the same"),
    ("no key fits", "evaluate", "model", "sft", rename("lora"), r"bug: \d+ tensors of the adapter do not fit the base, first base_model\."),
    ("some keys do not fit", "evaluate", "model", "sft", rename("layers.1"), r"bug: \d+ tensors of the adapter do not fit the base, first base_model\."),
    ("some keys do not fit", "sft", "adapter", "sft", rename("layers.1"), r"bug: \d+ tensors of the adapter do not fit the base, first base_model\."),
    ("some keys do not fit", "merge", "adapters.0", "sft", rename("layers.1"), r"bug: \d+ tensors of the adapter do not fit the base, first base_model\."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "slot", "of", "edit", "message"), [row[1:] for row in WRONG], ids=[f"{row[0]}-{row[1]}" for row in WRONG])
def test_an_artifact_that_was_built_wrong_is_noticed(
    world: World, wrong: Callable[..., Input], tmp_path: Path, kind: str, slot: str, of: str, edit: Any, message: str
) -> None:
    inputs = {**world.inputs(kind), slot: wrong(of, edit)}
    fields = {"adapter": "other"} if slot == "adapter" else {}
    refused(world.run(tmp_path / "run", kind, inputs=inputs, **fields), message)
