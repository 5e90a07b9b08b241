"""One translation: the keys of one command or file of another tool, and the stages that they make."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tuneline.config.spec import STAGES
from tuneline.errors import ConfigError, Problem
from tuneline.imports.fates import Fate, Joined, Refused, Table, Without, Written, fate_of, field_of
from tuneline.paths import folder_to_allow, outside, resolve_path
from tuneline.wording import short, shown

UNRESOLVED = re.compile(r"\$[\w({@*]")  # a shell variable that the script does not set, or an interpolation without a value
OFF: tuple[Any, ...] = (None, False, -1, "", "none", "None", [], {}, "[]", "{}")
SECRET = re.compile(r"(token|key|secret|password)$", re.IGNORECASE)  # keys whose values are never shown


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


class Ref(str):
    """A role whose stage a field names."""


@dataclass(frozen=True)
class Given:
    """A key's value in the source, and its line."""

    value: Any
    line: int


@dataclass(frozen=True)
class Launch:
    """How a command is started: GPUs per machine (None if nothing says it), their indices, processes per machine, machines."""

    gpus: int | None = None
    devices: tuple[int, ...] = ()
    processes: int | None = None
    nodes: int = 1


@dataclass
class Job:
    """One command of a tool, or one of its files. `name` is the source as the user wrote it; its relative paths start at the first of
    `folders` that has the file. Paths of the result are relative to `target`."""

    tool: str
    action: str
    given: dict[str, Given]
    name: str
    folders: tuple[Path, ...]
    target: Path
    launch: Launch = Launch()
    environment: dict[str, Given] = field(default_factory=dict)

    def wrong(self, key: str, message: str, hint: str) -> ConfigError:
        line = self.given[key].line if key in self.given else min((given.line for given in self.given.values()), default=1)
        return ConfigError([Problem(key, message, hint, place=f"{self.name}:{line}:1")])

    def path(self, named: str) -> Path:
        """Return where a relative path of the source leads: the first folder that has it, else the first."""
        paths = [folder / Path(named).expanduser() for folder in self.folders]
        return next((path for path in paths if exists(path)), paths[0])


@dataclass(frozen=True)
class Note:
    """A key of the source that became a comment."""

    key: str
    given: Given
    fate: Without | Refused
    source: str = ""

    def __str__(self) -> str:
        """Return the key with its value and its place."""
        where = f" ({self.source or 'line '}{self.given.line})" if self.given.line else ""
        value = self.given.value
        text = "..." if SECRET.search(self.key) else ", ".join(map(str, value)) if isinstance(value, list) else value
        return f"{short(self.key)}: {shown(text).strip(chr(39))}{where}"


class Translation:
    """The stages that one job makes, by role (`base`, `data`, `train`, ...), with a comment for fields that need one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.parts: dict[str, dict[str, Any]] = {}
        self.comments: dict[tuple[str, str], str] = {}
        """Comments by (role, path of the field)."""
        self.origins: dict[tuple[str, str], str] = {}
        """Keys of the source that wrote a field, by (role, first name of its path)."""
        self.notes: list[Note] = []
        self.remarks: list[str] = []
        self.used: set[str] = set()
        """Keys of the source that became fields."""
        self.joined: dict[str, Joined] = {}
        """Keys that are read together with others, by the module of the tool."""
        self.missing: list[str] = []
        """Local paths that do not exist."""
        self.roots: list[str] = []
        """Folders outside of the result's, which paths lead into."""

    def value(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first key that is given; None counts as absent."""
        return next((self.job.given[key].value for key in keys if key in self.job.given and self.job.given[key].value is not None), default)

    def on(self, *keys: str) -> bool:
        return any(self.value(key) in (True, "True", "true", "yes", 1) for key in keys)

    def begin(self, role: str, kind: str) -> None:
        self.parts[role] = {"kind": kind, **self.parts.get(role, {})}

    def write(self, path: str, value: Any, comment: str = "", key: str = "") -> None:
        """Write one field of a stage. Raises KeyError for a role that has not begun."""
        role, *names = path.split(".")
        at = self.parts[role]
        for name in names[:-1]:
            inner = at.setdefault(name, {})
            at = inner if isinstance(inner, dict) else at
        at[names[-1]] = value
        if comment:
            self.comments[role, ".".join(names)] = comment
        if key:
            self.origins.setdefault((role, names[0]), key)
            self.use(key)

    def use(self, *keys: str) -> None:
        """Mark keys, if they are given, as read: they are part of a field."""
        self.used |= {key for key in keys if key in self.job.given}
        self.notes = [note for note in self.notes if note.key not in keys]

    def local(self, named: str) -> str:
        """Return a local path for the result: relative below its folder, else absolute. One that does not exist stays as it is."""
        path, target = self.job.path(named), Path(os.path.abspath(self.job.target))
        found = exists(path if not re.search(r"[*?]", path.name) else path.parent)
        absolute = Path(os.path.abspath(path))
        if absolute.is_relative_to(target):
            named = str(absolute.relative_to(target))
        elif found:
            named = str(absolute)
        if not found:
            self.missing.append(named)
        if outside(resolve_path(target, named), (target,)):
            self.roots.append(folder_to_allow(named))
        return named

    def close(self) -> None:
        """Name every joined key that became no field, so that none is dropped silently."""
        noted = {note.key for note in self.notes}
        for key, fate in self.joined.items():
            if key not in self.used and key not in noted:
                self.note(key, Refused(f"write {field_of(fate)} yourself"))

    def note(self, key: str, fate: Without | Refused) -> None:
        """Name a key in a comment. One that is off anyway is not refused."""
        self.used.discard(key)
        given = self.job.given.get(key) or self.job.environment.get(key)
        if given is None:  # a default of the tool
            self.remarks.append(f"{key}: {fate.reason}")
            return
        if isinstance(fate, Refused) and given.value in OFF and not fate.even_off:
            fate = Without("it is off, as here")
        self.notes.append(Note(key, given, fate))

    def apply(self, table: Table, defaults: Mapping[str, Any]) -> None:
        """Give every key its fate, and write the tool's defaults where ours differ."""
        for key, given in self.job.given.items():
            outcome = self._written(key, given.value, fate_of(key, table, self._training()))
            if isinstance(outcome, Without | Refused):
                self.note(key, outcome)
            elif isinstance(outcome, Joined):
                self.joined[key] = outcome
        for key, value in defaults.items():
            fate = table[key]
            if key in self.job.given or not isinstance(fate, Written):
                continue
            for path in fate.paths:
                if path.partition(".")[0] in self.parts and self.lacks(path) and fate.convert(value) != self.ours(path):
                    self.write(path, fate.convert(value), f"{self.job.tool}'s default")

    def _written(self, key: str, value: Any, fate: Fate) -> Fate:
        if isinstance(value, str) and UNRESOLVED.search(value) and isinstance(fate, Written | Joined):
            return Refused(f"its value is not in the source: write the field yourself ({field_of(fate)})")
        if not isinstance(fate, Written):
            return fate
        if value is None:
            return Without("it has no value")
        try:
            converted = fate.convert(value)
        except (ValueError, TypeError, AttributeError, OverflowError):
            return Refused(f"its value is none that can be translated: write the field yourself ({field_of(fate)})")
        if isinstance(converted, Without | Refused):
            return converted
        paths = [path for path in fate.paths if path.partition(".")[0] in self.parts]
        for path in paths:
            self.write(path, converted, key=key)
        return fate if paths else Without("it does not concern what this command does")

    def lacks(self, path: str) -> bool:
        role, *names = path.split(".")
        at: Any = self.parts.get(role, {})
        for name in names:
            if not isinstance(at, dict) or name not in at:
                return True
            at = at[name]
        return False

    def ours(self, path: str) -> Any:
        """Return our default of a field, or None if there is no such field."""
        role, *names = path.split(".")
        model: Any = STAGES.get(self.parts[role]["kind"])
        found: Any = None
        for name in names:
            if model is None or name not in model.model_fields:
                return None
            found = model.model_fields[name].default
            model = type(found) if isinstance(found, BaseModel) else None
        return found

    def _training(self) -> type[BaseModel] | None:
        return STAGES.get(self.parts.get("train", {}).get("kind", "sft"))
