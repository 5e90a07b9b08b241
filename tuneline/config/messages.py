"""Translate pydantic's errors into messages: what was found, what is expected, and the nearest name for a misspelled one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tuneline.config import hints
from tuneline.config.other_tools import OTHER_VALUES
from tuneline.config.pools import INTERVAL, POOLS, SIZE
from tuneline.config.spec import STAGES, Spec
from tuneline.config.yaml_source import Keys, yaml_value
from tuneline.kinds.fields import MAX_NAME, NAME, REPOSITORY, REVISION
from tuneline.kinds.merge import SHARD
from tuneline.kinds.rewards import REWARDS, type_of
from tuneline.kinds.sources import SOURCES
from tuneline.wording import nearest, short, shown

TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list", "dict": "a mapping"}
FORMS = {  # by pattern; a test compares them with the types
    NAME: "lower-case letters, digits and dashes, at most 63",
    REPOSITORY: "owner/name, as on the hub",
    REVISION: "a branch, tag or commit",
    SHARD: "a size such as 500MB or 5GB",
    INTERVAL: "a time such as 30m, 6h or 7d",
    SIZE: "a size such as 512Mi or 16Gi",
}
UNITS = {SHARD: "GB", INTERVAL: "m", SIZE: "Gi"}  # unit to suggest for a number without a unit or with an unknown one
UNQUOTED = "remove the quotes"
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def translate(error: ValidationError, tree: Any) -> Iterator[tuple[Keys, bool, str, str]]:
    """Yield (path, whether the place is the key, message, hint). The failed branches of a union become one `a or b`."""
    by_path: dict[tuple[Keys, bool], tuple[str, list[str], str]] = {}
    listed = set[Keys]()
    for detail in error.errors(include_url=False):
        path, node = _in_tree(detail, tree)
        if detail["type"] == "too_short" and node:
            continue  # its items are invalid and reported themselves
        if detail["type"] == "extra_forbidden":
            at_key, (found, expected, hint) = True, _unknown_field(path, tree, listed)
        else:
            at_key, found, expected, hint = _words(detail, path, node, tree)
        known = by_path.setdefault((path, at_key), (found, [], hint))
        if expected not in known[1]:
            known[1].append(expected)
        by_path[path, at_key] = (*known[:2], known[2] or hint)
    outer = {path[:length] for path, _ in by_path for length in range(len(path))}
    for (path, at_key), (found, allowed_list, hint) in by_path.items():
        if path in outer and not at_key:
            continue  # one branch of a union fits, apart from the problems within it
        yield path, at_key, f"found {found}, expected {' or '.join(allowed_list)}", hint


def _in_tree(detail: ErrorDetails, tree: Any) -> tuple[Keys, Any]:
    """Return the error's path, without the names of union branches that pydantic inserts, and the value there."""
    path: list[str | int] = []
    node: Any = tree
    branch = None
    parts: list[str | int] = [part for part in detail["loc"] if part != "[key]"]
    if detail["type"] == "union_tag_invalid":
        parts.append(_discriminator(detail))
    for i, part in enumerate(parts):
        if branch is not None and part == branch:
            branch = None
        elif part in (range(len(node)) if isinstance(node, list) else node if isinstance(node, dict) else ()):
            node = node[part]
            path.append(part)
            branch = _branch(path, node)
        elif i == len(parts) - 1 and detail["type"] == "missing":
            return (*path, part), None
    return tuple(path), node


def _branch(path: list[str | int], node: Any) -> Any:
    """Return what pydantic inserts into a path after a stage or a source: its kind or type."""
    if not isinstance(node, dict):
        return None
    if _is_stage(path):
        return node.get("kind")
    if len(path) == 6 and path[4] == "rewards":
        return type_of(node)
    return node.get("type") if path[-2:-1] == ["sources"] or (len(path) == 2 and path[0] == "pools") else None


def _is_stage(path: Sequence[str | int]) -> bool:
    return len(path) == 4 and (path[0], path[2]) == ("pipelines", "stages")


def _discriminator(detail: ErrorDetails) -> str:
    return str(detail["ctx"]["discriminator"]).strip("'")


def _words(detail: ErrorDetails, path: Keys, node: Any, tree: Any) -> tuple[bool, str, str, str]:
    """Return (at key, found, expected, hint) of one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return True, "nothing", _described(path, tree), _add(path, tree)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = _discriminator(detail)
        choices = STAGES if tag == "kind" else POOLS if path[0] == "pools" else REWARDS if "rewards" in path[4:] else SOURCES
        names = list(choices)
        if kind == "union_tag_not_found":
            hint = "add " + " or ".join(f"`{tag}: {name}`" for name in hints.tags_of(node, choices))
            return True, f"no `{tag}`", ", ".join(names), hint
        others = _kinds_called(str(node)) if tag == "kind" else hints.source_type(str(node)) if choices is SOURCES else ""
        return False, shown(node), ", ".join(names), others or (nearest(node, names) if isinstance(node, str) else "")
    if "[key]" in detail["loc"]:
        return True, f"the name `{short(str(path[-1]))}`", FORMS[NAME], _slug(str(path[-1]))
    if kind == "literal_error":
        names = [name.strip("'") for name in str(context["expected"]).replace(" or ", ", ").split(", ")]
        others = OTHER_VALUES.get((str(path[-1]), str(node)), "")
        hint = "write `version: 1`" if path == ("version",) else others or nearest(node, names)
        return False, shown(node), ", ".join(names), UNQUOTED if node in names else hint
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return False, shown(node), f"{words} {_plain(context[name])}", ""
    pattern = context.get("pattern") or (_pattern_at(path, tree) if kind == "string_type" else "")
    if pattern in UNITS:
        meant = f"{str(node).rstrip('GiB ')}{UNITS[pattern]}"
        return False, shown(node), FORMS[pattern], f"write `{meant}`" if re.match(pattern, meant) else ""
    if kind == "string_pattern_mismatch":
        return False, shown(node), FORMS[pattern], hints.elsewhere_than_hub(str(path[-1]), node) if pattern == REPOSITORY else ""
    if kind in ("string_too_short", "string_too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        return False, shown(node), "text that is not empty" if least == 1 else f"at most {most} characters", ""
    if kind in ("too_short", "too_long"):
        found = f"{shown(node)} of {len(node)}" if node else shown(node).replace("a ", "an empty ")
        return False, found, f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}", ""
    name = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float").removesuffix("_attributes")
    name = "dict" if name == "model" else name
    if name == "dict" and _is_stage(path) and (node is None or node in list(STAGES)):
        return False, shown(node), TYPES[name], f"write `kind: {node or '...'}` and the stage's other fields below its name, indented"
    shape = hints.as_mapping(path, node) if name == "dict" else hints.as_list(path, node) if name == "tuple" else ""
    return False, shown(node), TYPES.get(name, detail["msg"]), shape or _as_meant(node, name)


def _unknown_field(path: Keys, tree: Any, listed: set[Keys]) -> tuple[str, str, str]:
    """Return (found, expected, hint). All fields of a mapping are listed once, at its first unknown field without a hint."""
    name, here = str(path[-1]), path[:-1]
    model = _model_at(here, tree)
    hint = hints.alias(name, model) or _elsewhere(name, here, tree)
    names = list(model.model_fields) if model else []
    if (hint or here in listed) and names:
        return f"the unknown field `{short(name)}`", f"a field of {_owner(here, tree)}", hint or nearest(name, names)
    listed.add(here)
    return f"the unknown field `{short(name)}`", ", ".join(names), nearest(name, names)


def _owner(path: Keys, tree: Any) -> str:
    """Return the name of the mapping at `path` for a sentence."""
    if not path:
        return "the file"
    if _is_stage(path):
        return str(tree["pipelines"][path[1]]["stages"][path[3]]["kind"])
    return f"`{next(part for part in reversed(path) if isinstance(part, str))}`"


def _add(path: Keys, tree: Any) -> str:
    """Return a hint to add the missing field at `path`."""
    value = "1" if path == ("version",) else hints.example(str(path[-1]), path, tree)
    return f"add `{path[-1]}: {value}`"


def _kinds_called(name: str) -> str:
    """Return a hint with the kinds that other tools call `name` and their purposes, or that tuneline has no such kind.
    Empty for other names."""
    if absent := hints.absent_kind(name):
        return absent
    called = re.sub(r"[-_ ]", "", name.lower())
    found = {kind: stage for kind, stage in STAGES.items() if called in stage.also_called}
    return "write " + " or ".join(f"`{kind}` ({_purpose(stage)})" for kind, stage in found.items()) if found else ""


def _purpose(stage: type[BaseModel]) -> str:
    """Return the first sentence of a kind's docstring, as part of a sentence."""
    first = re.split(r"(?<!arXiv)[.,:(](?:\s|$)| \(", (stage.__doc__ or "").strip(), maxsplit=1)[0]
    return first[:1].lower() + first[1:]


def _as_meant(node: Any, wanted: str) -> str:
    """Return a hint how to write the value as the wanted type."""
    if wanted == "dict" and node is None:
        return "write its content below it, indented, or remove it"
    if wanted == "string" and isinstance(node, int | float):
        return "put quotes around it"
    if wanted == "bool" and str(node).lower() in ("yes", "on", "no", "off"):
        return f"write `{'true' if str(node).lower() in ('yes', 'on') else 'false'}`"
    value = yaml_value(node) if isinstance(node, str) else node
    if wanted == "int" and isinstance(value, float) and value.is_integer():
        return f"write `{int(value)}`"
    if not isinstance(node, str) or wanted not in ("int", "float", "bool"):
        return ""
    if not isinstance(value, str):
        return UNQUOTED
    return "write plain decimals, such as 1000 or 1e-4" if node[:1].isdigit() and wanted != "bool" else ""


def _plain(number: float) -> str:
    return str(int(number) if number == int(number) else number)


def _slug(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_NAME].rstrip("-")
    return f"did you mean `{slug}`?" if slug else ""


def _model_at(path: Keys, tree: Any) -> type[BaseModel] | None:
    """Return the model whose fields are at `path`; None in free mappings."""
    candidates: list[type[BaseModel]] = [Spec]
    node, in_container = tree, False
    for part in path:
        model = _choose(candidates, node)
        node = node[part]
        if in_container:
            in_container = False
        elif model is not None:
            annotation = model.model_fields[str(part)].annotation
            inside = list(_inside(annotation))
            candidates = [item for item in inside if isinstance(item, type) and issubclass(item, BaseModel)]
            in_container = any(get_origin(item) in (dict, tuple) for item in inside)
    return None if in_container else _choose(candidates, node)


def _choose(candidates: list[type[BaseModel]], node: Any) -> type[BaseModel] | None:
    if len(candidates) == 1:
        return candidates[0]
    tag = (node.get("kind") or type_of(node)) if isinstance(node, dict) else None
    return next((model for model in candidates if any(names.get(str(tag)) is model for names in (STAGES, SOURCES, POOLS, REWARDS))), None)


def _inside(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _inside(argument)


def _pattern_at(path: Keys, tree: Any) -> str:
    """Return the pattern of the field at `path`, or an empty string. It may be in a part of the field's type (`Size | None`)."""
    model = _model_at(path[:-1], tree)
    info = model.model_fields.get(str(path[-1])) if model else None
    places = [info, *(item for item in _inside(info.annotation) if isinstance(item, FieldInfo))] if info else []
    return next((str(item.pattern) for place in places for item in place.metadata if hasattr(item, "pattern")), "")


def _elsewhere(name: str, path: Keys, tree: Any) -> str:
    """Return a hint for a field that is unknown at `path`: the nested mapping or the other kinds that have it."""
    model = _model_at(path, tree)
    fields = model.model_fields if model else {}
    for outer, info in fields.items():
        if any(isinstance(item, type) and issubclass(item, BaseModel) and name in item.model_fields for item in _inside(info.annotation)):
            return f"write it under `{outer}:`"
    kinds = [kind for kind, other in STAGES.items() if model in STAGES.values() and name in other.model_fields]
    return f"it is a field of {' and '.join(kinds)}" if kinds else ""


def _described(path: Keys, tree: Any) -> str:
    model = _model_at(path[:-1], tree)
    description = model.model_fields[str(path[-1])].description if model else None
    return f"a value ({description.rstrip('.')})" if description else "a value: the field is required"
