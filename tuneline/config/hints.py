"""Hints for people who come from other tools, or write a value where a mapping, a list or the name of a stage belongs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any, get_args

from pydantic import BaseModel

from tuneline.config.aliases import FIELD_ALIASES
from tuneline.config.other_tools import ABSENT_KINDS, BENCHMARKS, EXAMPLES, FOREIGN, METHODS, SHAPES, SOURCE_TYPES
from tuneline.config.spec import STAGES
from tuneline.kinds.fields import REPOSITORY, Reference, marked_fields
from tuneline.kinds.rewards import REWARDS
from tuneline.kinds.sources import Format
from tuneline.wording import short

ADDRESS = re.compile(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co|modelscope\.cn/models)/(datasets/)?(?P<name>[^/]+/[^/?#]+)")
ROWS = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt", ".arrow")
LOCAL = ("model", "models", "checkpoint", "checkpoints", "data", "dataset", "datasets", "output", "outputs", "saves", "results", "runs")


def tool_of(tree: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the tool of a file without `pipelines`, and its keys that say so, if it has two or more; else nothing."""
    found = {tool: [key for key in keys if key in tree] for tool, keys in FOREIGN.items()}
    tool = max(found, key=lambda name: len(found[name]))
    return (tool, found[tool]) if len(found[tool]) >= 2 and "pipelines" not in tree else ("", [])


def foreign(tree: Mapping[str, Any]) -> str:
    """Return what a file without `pipelines` is, if it has two or more keys of another tool: `LLaMA-Factory (cutoff_len, stage)`."""
    tool, keys = tool_of(tree)
    return f"{tool} ({', '.join(keys[:2])})" if tool else ""


def alias(name: str, model: type[BaseModel] | None) -> str:
    """Return what to write instead of a field that other tools have, or nothing."""
    called = name.lower().replace("-", "_")
    tables = (FIELD_ALIASES.get(owner.__name__, {}) for owner in (model.__mro__ if model else ()))
    return next((table[called] for table in tables if called in table), "")


def absent_kind(name: str) -> str:
    return ABSENT_KINDS.get(re.sub(r"[-_ ]", "", name.lower()), "")


# --- names of models and data -----------------------------------------------------------------------------------------


def repository(named: str) -> str:
    """Return `owner/name` if `named` looks like a repository on the hub or its address, else nothing."""
    named = match["name"] if (match := ADDRESS.match(named)) else named
    local = named.partition("/")[0] in LOCAL or named.endswith((*ROWS, ".gguf"))
    return named if re.match(REPOSITORY, named) and not local else ""


def is_path(named: str) -> bool:
    return named.startswith((".", "/", "~")) or "/" in named or named.endswith((*ROWS, ".gguf"))


def model_stage(named: str) -> str:
    """Return the stage for a model that is named by its repository or path, or nothing."""
    if hub := repository(named):
        return f"{{kind: model, hub: {hub}}}"
    return f"{{kind: model, {'gguf' if named.endswith('.gguf') else 'path'}: {short(named)}}}" if is_path(named) else ""


def source(named: str) -> str:
    """Return the entry of `sources:` for rows that are named by their repository or path."""
    hub = repository(named)
    return f"{{type: hub, repo: {hub}}}" if hub else f"{{type: files, path: {short(named)}}}"


def in_place_of_stage(field: str, types: tuple[str, ...], named: str) -> str:
    """Return a hint for text that is no name of a stage. `field`: that of the reference, `types`: the artifacts that fit."""
    if field == "adapter" and named.lower() in METHODS:
        method = "write `method: qlora`" if named.lower() == "qlora" else "remove it: `method: lora` is the default"
        return f"{method}; `adapter` names a stage whose adapter is trained further"
    if field.startswith("datasets") and ("_" in named or named in BENCHMARKS) and not is_path(named):
        return f"for a benchmark of lm-eval, write `benchmarks: [{short(named)}]`"
    if "Model" in types and (stage := model_stage(named)):
        return f"add a stage `{stage}` and name it here"
    if "Dataset" in types and is_path(named):
        return f"add a stage `{{kind: dataset, sources: [{source(named)}]}}` and name it here"
    if types == ("Adapter",) and is_path(named):
        return "name a training stage of this pipeline: tuneline reads no adapters from elsewhere"
    return ""


def elsewhere_than_hub(field: str, named: str) -> str:
    """Return a hint for text under `hub` or `repo` that is no `owner/name`."""
    if hub := repository(named):
        return f"write `{hub}`"
    if not is_path(named):
        return ""
    return f"for local files, write `{source(named)}`" if field == "repo" else f"for a local folder, write `path: {short(named)}`"


def missing_path(field: str, kind: str, named: str) -> str:
    """Return a hint for a path that does not exist: it may be the name of a repository."""
    hub = repository(named)
    if not hub or PurePath(named).suffix in ROWS:
        return ""
    if kind == "model" and field == "path":
        return f"for a model on the hub, write `hub: {hub}`"
    return f"for a dataset on the hub, write `{{type: hub, repo: {hub}}}`" if field.startswith("sources.") else ""


# --- shapes -----------------------------------------------------------------------------------------------------------


def source_type(name: str) -> str:
    """Return what to write instead of a format, or another tool's type, under `type:` of a source."""
    if name in get_args(Format):
        return f"write `{{type: files, format: {name}, path: rows.jsonl}}`"
    return f"write `{SOURCE_TYPES[name]}`" if name in SOURCE_TYPES else ""


def as_mapping(path: tuple[str | int, ...], node: Any) -> str:
    """Return a hint how to write a value as the mapping that is expected at `path`."""
    parent, here = path[-2] if len(path) > 1 else "", path[-1]
    if parent == "sources" and isinstance(node, str):
        return f"write `{source(node)}`"
    if parent == "rewards" and isinstance(node, str):
        return f"write `{{type: {node}}}`" if node in REWARDS else f"write `{{file: rewards.py, function: {short(node)}}}`"
    if len(path) == 4 and path[2] == "stages" and node is not None and any(here in stage.model_fields for stage in STAGES.values()):
        return f"`{here}` is a field of a stage: indent it like the other fields of its stage"
    shape = SHAPES.get(str(parent if isinstance(here, int) else here), "") if node is not None else ""
    return f"write `{shape}`" if shape else ""


def as_list(path: tuple[str | int, ...], node: Any) -> str:
    """Return a hint how to write a value as the list that is expected at `path`."""
    if isinstance(node, dict):
        return "put it into a list: write `- ` before its first field, or `[` and `]` around it"
    if path[-1] == "sources" and isinstance(node, str):
        return f"write `[{source(node)}]`"
    text = ", ".join(part.strip() for part in node.split(",")) if isinstance(node, str) else str(node)
    return f"write `[{short(text)}]`" if isinstance(node, str | int | float) else ""


def tags_of(given: Mapping[str, Any], choices: Mapping[str, type[BaseModel]]) -> list[str]:
    """Return the one or two names of the models with the most of the given fields, else `...`."""
    fitting = {name: len(given.keys() & model.model_fields.keys()) for name, model in choices.items()}
    best = [name for name, count in fitting.items() if count == max(fitting.values())]
    return best if max(fitting.values()) and len(best) <= 2 else ["..."]


def example(field: str, path: tuple[str | int, ...], tree: Any) -> str:
    """Return a value for the field at `path`: a stage of the same pipeline that fits, or a fixed example."""
    names = list(_stages_of_kinds(_kinds_for(field), path, tree))
    if names:
        return f"[{names[0]}]" if field == "adapters" else names[0]
    return EXAMPLES.get(field, "...")


@lru_cache
def _kinds_for(field: str) -> tuple[str, ...]:
    """Return the kinds whose artifact every field of this name takes; for a field that takes any stage, those that report metrics."""
    marks = [mark for stage in STAGES.values() for name, mark in marked_fields(stage, Reference) if name == field]
    taken = [set(mark.types or ("Report",)) for mark in marks]
    types = set[str].intersection(*taken) if taken else set[str]()
    kinds = {kind: stage for kind, stage in STAGES.items() if stage.model_construct(kind=kind).output_type() in types}
    return tuple(kind for kind, stage in kinds.items() if not (stage.quantized and any(mark.full_precision for mark in marks)))


def _stages_of_kinds(kinds: tuple[str, ...], path: tuple[str | int, ...], tree: Any) -> Iterator[str]:
    if len(path) < 4 or path[0] != "pipelines":
        return
    stages = tree["pipelines"][path[1]]["stages"]
    for kind in kinds:
        yield from (name for name, raw in stages.items() if isinstance(raw, dict) and raw.get("kind") == kind and name != path[3])
