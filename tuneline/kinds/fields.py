"""Field types of pipelines.yaml beyond plain values: references to other stages and outside paths, and how to find them.

A marker in the field's annotation declares the type. `annotated_values` yields all values with a marker, so checks, keys and
requests use the same declarations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ArtifactType = Literal["Model", "Adapter", "Dataset", "Report", "Verdict"]


@dataclass(frozen=True)
class Reference:
    """Mark a field that names a stage with one of these artifact types (empty: any stage)."""

    types: tuple[ArtifactType, ...] = ()
    full_precision: bool = False
    """Whether to reject quantized models."""


@dataclass(frozen=True)
class OutsideFile:
    """Mark a path relative to pipelines.yaml. The key includes its content, never the path."""


@dataclass(frozen=True)
class PinnedByCommit:
    """The field holds a revision of a hub repository; the commit that it resolves to, never its name, is in the key."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


ModelRef = Annotated[str, Reference(("Model",))]
FullPrecisionRef = Annotated[str, Reference(("Model",), full_precision=True)]
AdapterRef = Annotated[str, Reference(("Adapter",))]
ModelOrAdapterRef = Annotated[str, Reference(("Model", "Adapter"))]
DatasetRef = Annotated[str, Reference(("Dataset",))]
ReportRef = Annotated[str, Reference(("Report",))]
StageRef = Annotated[str, Reference()]
ExternalPath = Annotated[str, OutsideFile()]
OnUnrendered = Literal["error", "drop", "keep"]
# Names become parts of paths and URLs: none may contain `..` or lead out of a folder.
NAME, REPOSITORY, REVISION = r"^[a-z0-9][a-z0-9-]*$", r"^\w[\w.-]*/\w[\w.-]*$", r"^[\w-]+([./][\w-]+)*$"
MAX_NAME = 63
Name = Annotated[str, Field(pattern=NAME, max_length=MAX_NAME)]
Repository = Annotated[str, Field(pattern=REPOSITORY)]
Revision = Annotated[str, Field(pattern=REVISION), PinnedByCommit()]


def annotated_values(model: BaseModel, marker: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted path, marker instance, value) for every set field of `model`, including nested ones, that has `marker`."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        path = f"{prefix}{name}"
        mark = _marker_in(info.metadata, info.annotation, marker)
        for suffix, item in _items(value):
            if isinstance(item, BaseModel):
                yield from annotated_values(item, marker, f"{path}{suffix}.")
            elif mark is not None and isinstance(item, str):
                yield f"{path}{suffix}", mark, item


def marked_fields(model: type[BaseModel], marker: type) -> Iterator[tuple[str, Any]]:
    """Yield (name, marker instance) of every field of a class, including nested ones, that has `marker`."""
    for name, info in model.model_fields.items():
        if (mark := _marker_in(info.metadata, info.annotation, marker)) is not None:
            yield name, mark
        for nested in _models_in(info.annotation):
            yield from marked_fields(nested, marker)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        yield from ((f".{i}", item) for i, item in enumerate(value))
    elif value is not None:
        yield "", value


def _marker_in(metadata: list[Any], annotation: Any, marker: type) -> Any:
    """Return the marker in `Annotated[...]`, including inside a tuple or an optional."""
    for item in metadata:
        if isinstance(item, marker):
            return item
    for argument in getattr(annotation, "__args__", ()):
        found = _marker_in(list(getattr(argument, "__metadata__", ())), argument, marker)
        if found is not None:
            return found
    return None
