"""What becomes of a key of another tool.

Every key has a fate. It is `Written` to fields of stages, `Joined` with other keys in a field, `Without` effect here, or `Refused`,
with what to do instead. A table of a tool is a dict from key to fate; a key that is in no table takes its fate from
`config/aliases.py`, which has the hints of `tuneline validate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tuneline.config.hints import alias
from tuneline.config.spec import STAGES

REMOVE = "remove it: "


@dataclass(frozen=True)
class Without:
    """The key has no effect here, because of `reason`."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The key has no counterpart; `reason` is what to do instead. A value that is off is not refused, unless it is refused `even_off`."""

    reason: str
    even_off: bool = False


@dataclass(frozen=True)
class Joined:
    """The key is read together with others that make `field`."""

    field: str


@dataclass(frozen=True)
class Written:
    """The key's value goes to `paths` (`train.lora.r`), converted. A conversion returns Without or Refused for a value without
    counterpart."""

    paths: tuple[str, ...]
    convert: Callable[[Any], Any] = lambda value: value


Fate = Without | Refused | Joined | Written
Table = Mapping[str, Fate]


def to(*paths: str, by: Callable[[Any], Any] = lambda value: value) -> Written:
    return Written(paths, by)


def same_if(values: Collection[Any], why: str, otherwise: Without | Refused) -> Written:
    """Return the fate of a key that has no effect here with some values, and another fate with all others."""
    return Written((), lambda value: Without(why) if value in values else otherwise)


def each(keys: str, fate: Fate) -> dict[str, Fate]:
    """Return the same fate for several keys."""
    return dict.fromkeys(keys.split(), fate)


def fate_of(key: str, table: Table, model: type[BaseModel] | None = None) -> Fate:
    """Return the fate of a key by the tool's table (`a.*` is all keys below `a`), else by the hints of `tuneline validate`."""
    parts = key.split(".")
    for name in (key, *(f"{'.'.join(parts[:n])}.*" for n in range(len(parts) - 1, 0, -1))):
        if name in table:
            return table[name]
    hint = alias(key, model or STAGES["sft"])
    if hint.startswith(REMOVE):
        return Without(hint.removeprefix(REMOVE))
    return Refused(hint or "tuneline has no such setting")


def kind_of(fate: Fate) -> str:
    """Return what a fate is called in tables."""
    return {Without: "no effect", Refused: "refused"}.get(type(fate), "translated")


def field_of(fate: Written | Joined) -> str:
    """Return the field that a key is written to, for a message."""
    return f"`{(fate.paths[0] if isinstance(fate, Written) else fate.field).partition('.')[2]}`"
