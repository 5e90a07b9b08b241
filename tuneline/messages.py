"""pydantic's errors in the words of pipelines.yaml: what was found, what is allowed, and the nearest name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tuneline.data_sources import CodeSource, FilesSource, HubSource, ReasoningGymSource
from tuneline.source import Keys
from tuneline.spec import STAGES, Spec

SOURCES: dict[str, type[BaseModel]] = {"files": FilesSource, "hub": HubSource, "reasoning_gym": ReasoningGymSource, "code": CodeSource}
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list", "dict": "a mapping"}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def nearest(name: Any, known: Iterable[str]) -> str:
    """`did you mean ...?`, or nothing where no name is near."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"did you mean `{matches[0]}`?" if matches else ""


def translate(error: ValidationError, tree: Any) -> Iterator[tuple[Keys, bool, str, str]]:
    """Yields (path, whether its key is at fault, message, hint). The branches of a union that failed become one `a or b`."""
    by_path: dict[tuple[Keys, bool], tuple[Any, list[str], str]] = {}
    for detail in error.errors(include_url=False):
        path, found = _in_tree(detail, tree)
        if detail["type"] == "too_short" and found:
            continue  # its items are wrong, and are reported themselves
        at_key, found, allowed, hint = _words(detail, path, found, tree)
        known = by_path.setdefault((path, at_key), (found, [], hint))
        if allowed not in known[1]:
            known[1].append(allowed)
    for (path, at_key), (found, allowed_list, hint) in by_path.items():
        yield path, at_key, f"found {found}, allowed {' or '.join(allowed_list)}", hint


def _in_tree(detail: ErrorDetails, tree: Any) -> tuple[Keys, Any]:
    """The error's path without the names of union branches that pydantic puts in, and the value there."""
    path: list[str | int] = []
    node = tree
    parts = [part for part in detail["loc"] if part != "[key]"]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif last and detail["type"] == "missing":
            node = None
        else:
            continue
        path.append(part)
    return tuple(path), node


def _words(detail: ErrorDetails, path: Keys, found: Any, tree: Any) -> tuple[bool, str, str, str]:
    """(at key, found, allowed, hint) of one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        names = _fields_at(path[:-1], tree)
        return True, f"the unknown field `{path[-1]}`", ", ".join(names), nearest(path[-1], names)
    if kind == "missing":
        return True, "nothing", _described(path, tree), f"add `{path[-1]}: ...`"
    if kind == "union_tag_not_found":
        tag = str(context["discriminator"]).strip("'")
        return True, f"no `{tag}`", ", ".join(STAGES if tag == "kind" else SOURCES), f"add `{tag}: ...`"
    if kind == "union_tag_invalid":
        names = list(STAGES if context["discriminator"] == "'kind'" else SOURCES)
        return True, f"`{context['tag']}`", ", ".join(names), nearest(context["tag"], names)
    if "[key]" in detail["loc"]:
        return True, f"the name `{path[-1]}`", "lower-case letters, digits and dashes, at most 63", ""
    if kind == "literal_error":
        names = [name.strip("'") for name in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return False, _shown(found), ", ".join(names), nearest(found, names)
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return False, _shown(found), f"{words} {context[name]}", ""
    if kind == "string_pattern_mismatch":
        return False, _shown(found), f"text of the form {context['pattern']}", ""
    if kind == "too_short":
        return False, "nothing in it", f"at least {context['min_length']}", ""
    if kind == "too_long":
        return False, f"{context['actual_length']} of them", f"at most {context['max_length']}", ""
    if kind == "finite_number":
        return False, _shown(found), "a finite number", ""
    name = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float").removesuffix("_attributes")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        name = "dict"
    return False, _shown(found), TYPES.get(name, detail["msg"]), ""


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    return f"{value!r}"[:80] if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _model_at(path: Keys, tree: Any) -> type[BaseModel] | None:
    """The model whose fields stand at `path`; None in free mappings."""
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
    tag = (node.get("kind") or node.get("type")) if isinstance(node, dict) else None
    return next((model for model in candidates if (STAGES | SOURCES).get(str(tag)) is model), None)


def _inside(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _inside(argument)


def _fields_at(path: Keys, tree: Any) -> list[str]:
    model = _model_at(path, tree)
    return list(model.model_fields) if model else []


def _described(path: Keys, tree: Any) -> str:
    model = _model_at(path[:-1], tree)
    description = model.model_fields[str(path[-1])].description if model else None
    return f"a value ({description.rstrip('.')})" if description else "a value: the field is required"
