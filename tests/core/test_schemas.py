"""Files on disk have numbered schemas. When you change one, raise its number and update its hash here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from tuneline.config.load import load
from tuneline.config.order import in_order
from tuneline.kinds.dataset import DatasetStage
from tuneline.planning import keys
from tuneline.workspace import protocol, runs, store
from tuneline.workspace.history import input_slots

ROOT = Path(__file__).resolve().parents[2]


def print_of(model: type[BaseModel]) -> str:
    """Return a hash of the model's JSON Schema without its texts."""

    def bare(node: object) -> object:
        if isinstance(node, dict):
            return {key: bare(value) for key, value in node.items() if key not in ("description", "title")}
        return [bare(item) for item in node] if isinstance(node, list) else node

    return hashlib.sha256(json.dumps(bare(model.model_json_schema()), sort_keys=True).encode()).hexdigest()[:8]


SHAPES = [
    (store.Manifest, store.SCHEMA, (1, "c85a7ee3")),
    (runs.RunRecord, runs.SCHEMA, (5, "554da8c8")),
    (protocol.Request, protocol.SCHEMA, (6, "e41a67a6")),
    (protocol.Result, protocol.SCHEMA, (6, "31743b72")),
    (protocol.Failure, protocol.SCHEMA, (6, "04d98b6e")),
]


@pytest.mark.parametrize(("model", "number", "known"), SHAPES, ids=[shape[0].__name__ for shape in SHAPES])
def test_a_changed_shape_has_a_new_number(model: type[BaseModel], number: int, known: tuple[int, str]) -> None:
    assert (number, print_of(model)) == known, "raise SCHEMA in the model's module, and write the new pair here"


def test_the_key_document_of_every_kind_is_as_it_was() -> None:
    """A changed key rebuilds everything: it may change only with keys.SCHEMA or a default."""
    pipeline = load(ROOT / "pipelines.yaml").pipeline("demo")
    documents = {
        name: keys.key_document(stage, 1, {}, keys.Outside({"files": "x"}, libraries={"torch": "2.13.0"}))["config"]
        for name, stage in pipeline.stages.items()
        if stage.kind != "gate"
    }
    assert keys.SCHEMA == 1
    assert documents == {
        "base": {},
        "bookings": {"sources": [{"type": "files"}], "split": {"validation": 0.03}},
        "sft": {
            "learning_rate": 0.001, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_steps": 90, "global_batch_size": 8, "eval_steps": 30, "dtype": "float32",
        },
        "eval-base": {"max_new_tokens": 48, "dtype": "float32"},
        "eval-sft": {"max_new_tokens": 48, "dtype": "float32"},
        "merged": {},
        "gptq": {"group_size": 32, "samples": 64, "dtype": "float32"},
        "eval-gptq": {"max_new_tokens": 48, "dtype": "float32"},
    }  # fmt: skip


def test_the_shipped_pipelines_hang_together_as_they_did() -> None:
    spec = load(ROOT / "pipelines.yaml").spec
    assert list(spec.pipelines) == ["demo", "code-lora", "grpo-demo", "grpo", "lora-sft"]
    assert in_order(spec.pipelines["lora-sft"]) == ["base", "rows", "sft", "eval-base", "eval-sft", "merged", "gptq", "eval-gptq", "gate"]
    slots = {name: input_slots(stage) for name, stage in spec.pipelines["demo"].stages.items()}
    assert slots["sft"] == {"model": "base", "dataset": "bookings"}
    assert slots["merged"] == {"adapters.0": "sft"}
    assert slots["gptq"] == {"model": "merged", "calibration": "bookings"}
    assert slots["eval-gptq"] == {"model": "gptq", "datasets.0": "bookings"}


def test_of_revisions_only_those_of_the_hub_are_left_out_of_the_key() -> None:
    """The commit that they resolve to is in it. A reasoning-gym task may have a setting of that name."""

    def config(source: dict[str, object]) -> object:
        stage = DatasetStage.model_validate_json(json.dumps({"kind": "dataset", "sources": [source]}))
        return keys.key_document(stage, 1, {})["config"]["sources"]

    hub = {"type": "hub", "repo": "owner/rows", "revision": "v2"}
    assert config(hub) == config(hub | {"revision": "v3"}) == [{"type": "hub", "repo": "owner/rows"}]
    task = {"type": "reasoning_gym", "task": "leg_counting", "size": 3, "config": {"revision": 1}}
    assert config(task) != config(task | {"config": {"revision": 2}})
