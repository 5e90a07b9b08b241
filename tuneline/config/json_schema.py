"""JSON Schema of pipelines.yaml for editors: pydantic's, but `${name}` is allowed in place of numbers, choices and patterns."""

from __future__ import annotations

from typing import Any

from tuneline.config.spec import Spec

VARIABLE = {"type": "string", "pattern": r"\$\{[^{}]+\}"}
ANNOTATIONS = ("default", "description", "title")


def json_schema() -> dict[str, Any]:
    schema = Spec.model_json_schema()
    variables = schema["properties"]["vars"]
    opened: dict[str, Any] = _opened(schema)
    opened["properties"]["vars"] = variables
    return opened


def _opened(node: Any) -> Any:
    if isinstance(node, list):
        return [_opened(item) for item in node]
    if not isinstance(node, dict) or "const" in node:  # a constant selects the branch of a union
        return node
    has_form = isinstance(node.get("pattern"), str)  # under `properties` it is a field named "pattern"
    if node.get("type") in ("integer", "number", "boolean") or "enum" in node or has_form:
        annotations = {name: node[name] for name in ANNOTATIONS if name in node}
        return {**annotations, "anyOf": [{name: value for name, value in node.items() if name not in annotations}, VARIABLE]}
    return {name: value if name in ("propertyNames", "default") else _opened(value) for name, value in node.items()}
