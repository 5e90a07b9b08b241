"""Keep tasks/versions.json current: kind -> VERSION (part of every key), a digest of the program's code, and the fields' defaults.

    python infra/program_versions.py --check          fail if code or a default has changed without a verdict (make lint)
    python infra/program_versions.py --raise sft      verdict: the output changes, so the next run rebuilds artifacts of this kind
    python infra/program_versions.py --same sft       verdict: the output stays the same (a message, a comment, a speed-up, a new field
                                                      whose default keeps the previous behavior)

The digest covers the syntax tree of the program and of every module of `tasks` that it imports, without docstrings, comments
and layout. A key leaves out fields that equal their default, so a changed default gives another artifact under the same key: then
`--same` is refused.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # import the `tuneline` of this clone, even if another one is installed

from tuneline.config.spec import PROGRAM_STAGES  # noqa: E402
from tuneline.kinds.fields import PinnedByCommit  # noqa: E402
from tuneline.planning.keys import NOT_IN_KEY  # noqa: E402

VERSIONS = ROOT / "tasks" / "versions.json"
Defaults = dict[str, Any]


def programs() -> dict[str, str]:
    return {kind: stage.program for kind, stage in PROGRAM_STAGES.items()}


def modules_of(program: str) -> list[Path]:
    """Return the program's file and those of `tasks` that it imports, directly or indirectly."""
    found: set[Path] = set()
    waiting = [program]
    while waiting:
        path = ROOT / (waiting.pop().replace(".", "/") + ".py")
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tasks"):
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found)


def code_digest(program: str) -> str:
    digest = hashlib.sha256()
    for path in modules_of(program):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.relative_to(ROOT)}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def defaults_of(model: type[BaseModel], leave_out: frozenset[str] = frozenset(), prefix: str = "") -> Defaults:
    """Return dotted field -> default as JSON, with nested models: `lora.r`, `sources.files.format`, `rewards.length.weight`.

    A required field has no entry, because it is in every key. `leave_out`: fields of the model to skip.
    """
    found: Defaults = {}
    for name, field in model.model_fields.items():
        if name in leave_out or any(isinstance(mark, PinnedByCommit) for mark in field.metadata):
            continue
        path = f"{prefix}{name}"
        if not field.is_required():
            value = field.get_default(call_default_factory=True, validated_data={})
            # The defaults of nested models have their own entries.
            found[path] = TypeAdapter(type(value)).dump_python(value, mode="json", exclude_defaults=True)
        for inner in models_in(field.annotation):
            more = defaults_of(inner, prefix=f"{path}.{type_of(inner)}")
            if found.keys() & more.keys():
                raise SystemExit(f"{model.__name__}.{name} allows two models with the same fields; tell them apart by a field `type`")
            found |= more
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Return the models in an annotation, also inside unions, tuples and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def type_of(model: type[BaseModel]) -> str:
    """Return `length.` for a model with `type: Literal["length"]`, one of a union; an empty string for other models."""
    values = get_args(model.model_fields["type"].annotation) if "type" in model.model_fields else ()
    return f"{values[0]}." if values else ""


def changed(before: Defaults, after: Defaults) -> list[str]:
    """Return the fields whose default has changed: results differ, but keys do not."""
    return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])


def moved(kind: str, known: dict[str, Any], code: str, defaults: Defaults) -> Iterator[str]:
    """Return the differences from the entry of tasks/versions.json."""
    if known.get("source") != code:
        yield f"the code of `{kind}` has changed"
    before = known.get("defaults", {})
    for name in changed(before, defaults):
        yield f"a default of `{kind}` changed: {name} {json.dumps(before[name])} -> {json.dumps(defaults[name])}"
    for name in sorted(defaults.keys() - before.keys()):
        yield f"a default of `{kind}` is new: {name} {json.dumps(defaults[name])}"
    for name in sorted(before.keys() - defaults.keys()):
        yield f"a default of `{kind}` is gone: {name} {json.dumps(before[name])}"


def main(arguments: list[str]) -> int:
    known = json.loads(VERSIONS.read_text())
    now = {kind: (code_digest(module), defaults_of(PROGRAM_STAGES[kind], NOT_IN_KEY)) for kind, module in programs().items()}
    if arguments == ["--check"]:
        for kind, (code, defaults) in now.items():
            news = list(moved(kind, known.get(kind, {}), code, defaults))
            if not news:
                continue
            print("\n".join(news))
            print("say what that means for its output:")
            print(f"    python infra/program_versions.py --raise {kind}    other output: the next run builds its artifacts again")
            if changed(known.get(kind, {}).get("defaults", {}), defaults):
                print("(keys leave out what equals its default: --same would go on serving what the old default made)")
            else:
                print(f"    python infra/program_versions.py --same {kind}     the same output: they stay valid")
        as_known = {kind: (entry["source"], entry.get("defaults")) for kind, entry in known.items()}
        return 0 if as_known == now else 1
    if len(arguments) < 2 or arguments[0] not in ("--raise", "--same"):
        raise SystemExit(__doc__)
    rises = arguments[0] == "--raise"
    for kind in now if arguments[1:] == ["all"] else arguments[1:]:
        code, defaults = now[kind]
        before = known.get(kind, {"version": 0 if rises else 1, "defaults": {}})
        if not rises and (other := changed(before["defaults"], defaults)):
            message = f"--same {kind}: found other defaults of {', '.join(other)}, which keys leave out: its output is not the same"
            raise SystemExit(f"{message}\nhint: python infra/program_versions.py --raise {kind}")
        known[kind] = {"version": before["version"] + rises, "source": code, "defaults": defaults}
    VERSIONS.write_text(json.dumps({kind: known[kind] for kind in now if kind in known}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
