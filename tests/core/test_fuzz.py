"""Thousands of broken files: a mutated pipelines.yaml loads or is rejected with a place, quickly.

More examples than CI's: FUZZ_EXAMPLES=20000 .venv/bin/pytest tests/core/test_fuzz.py -q
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tuneline.canonical import canonical
from tuneline.config.json_schema import json_schema
from tuneline.config.load import Loaded, check
from tuneline.config.order import depends_on, in_order
from tuneline.config.spec import Spec
from tuneline.config.yaml_source import YamlDocument, parse, read
from tuneline.errors import ConfigError, Problem
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.keys import key_document

HERE = Path(__file__).resolve().parent
FILES = {"shipped": HERE.parents[1] / "pipelines.yaml", "every field": HERE / "every_field.yaml"}
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SLOW = 20.0  # CPU seconds that no file of this size may take
SCHEMA = jsonschema.Draft202012Validator(json_schema())
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def load_source(source: YamlDocument) -> Loaded:
    return check(source, Path("/project/p.yaml"), environment={"SCRATCH": "/scratch"})


def loads_or_is_refused(text: str) -> None:
    start = time.process_time()
    problems: tuple[Problem, ...] = ()
    loaded: Loaded | None = None
    try:
        source = parse(text, "p.yaml")
        tree = json.loads(json.dumps(source.tree))
        loaded = load_source(source)
    except ConfigError as error:
        problems = error.problems
    assert loaded or problems
    for problem in problems:
        assert re.match(r"p\.yaml:[1-9]\d*:[1-9]\d*$", problem.place)
        assert problem.message
        str(problem).encode()
    if loaded:
        is_coherent(loaded, tree)
    assert time.process_time() - start < SLOW


def is_coherent(loaded: Loaded, tree: Any) -> None:
    """A file that loads is usable: it has an order and keys, and the editors' schema accepts it."""
    SCHEMA.validate(tree)
    for pipeline in loaded.spec.pipelines.values():
        done: list[str] = []
        for name in in_order(pipeline):
            stage = pipeline.stages[name]
            assert set(depends_on(stage)) <= set(done)
            done.append(name)
            if isinstance(stage, ProgramStage):
                canonical(key_document(stage, 1, {}, salt=pipeline.salt))
        assert sorted(done) == sorted(pipeline.stages)


# --- characters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@fuzz
def test_changed_characters(name: str, data: st.DataObject) -> None:
    """Delete, duplicate or replace characters."""
    text = FILES[name].read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(st.text("{}[]:,-&*!'\"$ \n\tabz019.~#%<|>?@\\", max_size=4)) + text[at + length :]
    loads_or_is_refused(text)


# --- structure --------------------------------------------------------------------------------------------------------


class Pairs(list):  # type: ignore[type-arg]
    """A mapping that may have a key twice."""


class Raw(str):
    """Text that is written to the file verbatim."""


def nodes(tree: Any) -> Any:
    """Mappings as pairs, so that they can be broken."""
    if isinstance(tree, dict):
        return Pairs([[key, nodes(value)] for key, value in tree.items()])
    return [nodes(item) for item in tree] if isinstance(tree, list) else tree


def written(node: Any) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{written(key)}: {written(value)}" for key, value in node) + "}"
    return "[" + ", ".join(map(written, node)) + "]" if isinstance(node, list) else json.dumps(node)


def slots(node: Any) -> list[tuple[Any, int]]:
    """Return every (container, position) whose value can be moved; for a mapping, the container is one of its pairs."""
    found: list[tuple[Any, int]] = []
    for i, item in enumerate(node if isinstance(node, list) else ()):
        container, position = (item, 1) if isinstance(node, Pairs) else (node, i)
        found += [(container, position), *slots(container[position])]
    return found


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["..", "/", "~", "a" * 70, "${rank}", "${env:SCRATCH}", "main", "", 0, 1, -1, 10**30]),
    st.sampled_from(["!!python/name:os.system x", "!!int x", "!x y", "*first", "*self", "<<", "2024-01-01", "0x1f", "1_0", ".nan", "1e999", "&a b", "'", "? a", "%", "- a"]).map(Raw),
    st.sampled_from([[], {}, [[]], [{}], {"kind": "sft"}, {"type": "files"}]).map(nodes),
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@fuzz
def test_changed_structure(name: str, data: st.DataObject) -> None:
    """Delete, duplicate, move, swap or replace values, rename keys, insert anchors and aliases."""
    tree = nodes(read(FILES[name], "p.yaml").tree)
    for _ in range(data.draw(st.integers(1, 5))):
        everywhere = slots(tree)
        if not everywhere:
            break
        place = st.sampled_from(range(len(everywhere)))
        (container, i), (other, j) = everywhere[data.draw(place)], everywhere[data.draw(place)]
        what = data.draw(st.sampled_from(["replace", "swap", "copy", "delete", "double", "rename", "anchor", "merge", "reorder"]))
        value = container[i]
        if what == "replace":
            container[i] = data.draw(VALUES)
        elif what == "swap":
            if value not in _below(other[j]) and other[j] not in _below(value):
                container[i], other[j] = other[j], value
        elif what == "copy":
            other[j] = nodes_copy(value)
        elif what == "anchor":
            container[i], other[j] = Raw(f"&first {written(value)}"), Raw("*first")
        elif isinstance(value, list) and value:
            _change_container(value, what, data)
    loads_or_is_refused(written(tree))


def _change_container(value: list[Any], what: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(value) - 1))
    if what == "delete":
        del value[k]
    elif what == "double":
        value.append(nodes_copy(value[k]))
    elif what == "reorder":
        value.reverse()
    elif isinstance(value, Pairs):
        names = st.one_of(
            st.text(max_size=6), st.sampled_from(["kind", "type", "sft", "files", "model", "bool", "str", "stages", "<<", "x" * 65])
        )
        if what == "rename":
            value[k][0] = data.draw(st.one_of(names, st.sampled_from(["1", "true", "~", "[a]", "? b", "<<", "a.b"]).map(Raw)))
        else:
            value.append([Raw("<<"), Raw(data.draw(st.sampled_from(["*first", "{a: 1}", "[{kind: sft}, {seed: 1}]", "3", "[*first]"])))])


def _below(node: Any) -> list[Any]:
    return [container[i] for container, i in slots(node)] + [node]


def nodes_copy(node: Any) -> Any:
    if isinstance(node, Pairs):
        return Pairs([[key, nodes_copy(value)] for key, value in node])
    return [nodes_copy(item) for item in node] if isinstance(node, list) else node


# --- what is mutated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_valid_before_and_after_being_taken_apart(name: str) -> None:
    for text in (FILES[name].read_text(), written(nodes(read(FILES[name], "p.yaml").tree))):
        is_coherent(load_source(parse(text, "p.yaml")), parse(text, "p.yaml").tree)


def test_one_file_has_every_field() -> None:
    given_somewhere: set[tuple[str, str]] = set()
    exist: set[tuple[str, str]] = set()

    def visit(model: BaseModel) -> None:
        exist.update((type(model).__name__, name) for name in type(model).model_fields)
        given_somewhere.update((type(model).__name__, name) for name in model.model_fields_set)
        for value in model.__dict__.values():
            for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]:
                if isinstance(item, BaseModel):
                    visit(item)

    visit(load_source(read(FILES["every field"], "p.yaml")).spec)
    every_stage = {"description", "needs", "retries", "timeout", "runtime", "resources", "pool", "seed"}  # given once, for a model
    of_every_pool = ("concurrency", "queues", "gpu_memory")  # given once, for processes
    every_pool = {(model, name) for model in ("DockerPool", "KubernetesPool") for name in of_every_pool}
    assert {(model, name) for model, name in exist - given_somewhere if name not in every_stage or model == "ModelStage"} == every_pool
    assert {model for model, _ in exist} >= set(Spec.model_json_schema()["$defs"])
