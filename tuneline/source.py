"""YAML with places: `read` gives the plain tree of a file and where each key and value of it stands.

Only what JSON could say is accepted (strings, numbers, true/false, null, lists, mappings with string keys), plus anchors,
aliases and merge keys within bounds. Numbers and booleans are read as YAML 1.2 has them, so that `1e-4` is a number and
`on` a string. Python tags, duplicate keys, timestamps and alias bombs are errors with a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuneline.errors import ConfigError, Problem

Keys = tuple[str | int, ...]
MAX_NODES = 50_000  # after aliases are expanded; a 1,000-stage file has about 15,000
MAX_DEPTH = 40


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("null", r"null|Null|NULL|~|", "nN~\0"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first) + ([""] if _name == "null" else []))
# The first resolver that matches wins; an int also looks like a float.
for _resolvers in _Loader.yaml_implicit_resolvers.values():
    _resolvers.sort(key=lambda pair: pair[0] == _TAG + "float")


@dataclass
class Source:
    """`name` is the file as the user wrote it. Marks are (line, column), counted from 1."""

    name: str
    tree: Any = None
    keys: dict[Keys, tuple[int, int]] = field(default_factory=dict)
    values: dict[Keys, tuple[int, int]] = field(default_factory=dict)

    def place(self, path: Keys, at_key: bool = False) -> str:
        """FILE:LINE:COL of a key or value; of the nearest thing around it where it does not exist."""
        marks = self.keys if at_key else self.values
        for end in range(len(path), -1, -1):
            mark = marks.get(path[:end]) or self.keys.get(path[:end]) or self.values.get(path[:end])
            if mark:
                return f"{self.name}:{mark[0]}:{mark[1]}"
            marks = self.keys
        return f"{self.name}:1:1"


def read(path: Path, name: str) -> Source:
    """Reads a YAML file. Raises ConfigError, with a place, for anything that is not plain data."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([Problem(name, "", "no such file", "`tuneline init` writes one; `--file` names another")]) from None
    except IsADirectoryError:
        raise ConfigError([Problem(name, "", "found a folder, allowed a file", "name the file in it")]) from None
    except PermissionError:
        raise ConfigError([Problem(name, "", "the file may not be read", "check its permissions")]) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([Problem(f"{name}:{line}:1", "", "found bytes that are not UTF-8", "save the file as UTF-8")]) from None
    return parse(text, name)


def parse(text: str, name: str) -> Source:
    source = Source(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{name}:1:1"
        tab = "\\t" in str(error.problem)
        hint = "YAML is indented with spaces, not tabs" if tab else "check brackets, quotes and indentation near this line"
        raise ConfigError([Problem(place, "", f"this is not YAML: {error.problem}", hint)]) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError([Problem(f"{name}:{line}:1", "", "found a control character", "remove it: YAML is plain text")]) from None
    except RecursionError:
        raise ConfigError([Problem(f"{name}:1:1", "", f"found more than {MAX_DEPTH} levels", "nest less")]) from None
    if node is None:
        raise ConfigError(
            [Problem(f"{name}:1:1", "", "the file is empty", "`tuneline init` in an empty folder writes a file to start from")]
        )
    problems: list[Problem] = []
    source.tree = _Builder(source, problems).build(node, (), 0)
    if problems:
        raise ConfigError(problems)
    return source


class _Stop(Exception):
    pass


class _Builder:
    def __init__(self, source: Source, problems: list[Problem]):
        self.source, self.problems, self.nodes = source, problems, 0
        self.scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Keys, depth: int) -> Any:
        try:
            return self._build(node, path, depth)
        except _Stop:
            return None

    def _problem(self, node: yaml.Node, path: Keys, message: str, hint: str) -> None:
        place = f"{self.source.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        self.problems.append(Problem(place, dotted(path), message, hint))

    def _build(self, node: yaml.Node, path: Keys, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            what = f"more than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_NODES} values once aliases are expanded"
            self._problem(node, path, f"found {what}", "write the file with fewer aliases")
            raise _Stop
        self.source.values.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, depth)
        self._problem(node, path, f"found the tag {node.tag.replace(_TAG, '!!')}, allowed plain YAML without tags", "remove the tag")
        return None

    def _scalar(self, node: yaml.ScalarNode, path: Keys) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return node.value
        if kind == "int":
            return int(node.value)
        if kind in ("bool", "null", "float"):
            return self.scalars.construct_object(node)
        self._problem(node, path, f"found the tag {node.tag.replace(_TAG, '!!')}, allowed plain YAML without tags", "remove the tag")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Keys, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                found = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._problem(key_node, path, f"found the key {found}, allowed text", "put quotes around it if it is meant as a name")
                continue
            key = key_node.value
            if key in result:
                first = self.source.keys[(*path, key)][0]
                self._problem(key_node, (*path, key), f"found `{key}` twice, first in line {first}", "keep one of them")
                continue
            self.source.keys[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            result[key] = self._build(value_node, (*path, key), depth + 1)
        for other in merged:
            inherited = self._build(other, path, depth + 1)
            if not isinstance(inherited, dict):
                self._problem(other, path, "found a merge key `<<` without a mapping", "write `<<: *anchor`")
                continue
            result |= {key: value for key, value in inherited.items() if key not in result}
        return result


def dotted(path: Keys) -> str:
    """`demo.sft.lora.r` for a field of a stage, the path in the file otherwise."""
    shown = list(path)
    if len(shown) >= 2 and shown[0] == "pipelines":
        shown = shown[1:]
        if len(shown) >= 2 and shown[1] == "stages":
            del shown[1]
    return ".".join(str(part) for part in shown)
