"""YAML with places: `read` returns the plain tree of a file and the line and column of each key and value.

Only JSON's data model is accepted (strings, finite numbers, true/false, null, lists, mappings with string keys), plus
anchors, aliases and merge keys within limits. Numbers and booleans follow YAML 1.2, so that `1e-4` is a number and `on` a
string. Tags, duplicate keys, control characters and alias bombs are errors with a line.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuneline.config.yaml_syntax import syntax
from tuneline.errors import ConfigError, Problem
from tuneline.wording import short

Keys = tuple[str | int, ...]
MAX_BYTES = 1_000_000  # a 1,000-stage file has about 150,000
MAX_NODES = 50_000  # after aliases are expanded; a 1,000-stage file has about 15,000
MAX_DEPTH = 40
MAX_DIGITS = 18  # every JSON parser keeps this many exactly
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_PLAIN = {
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?[0-9]+$"),
    "float": re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    "null": re.compile(r"^(?:null|Null|NULL|~|)$"),
    "merge": re.compile(r"^<<$"),
}
# The first that matches wins: an int also looks like a float.
for _name, _first in (("bool", "tTfF"), ("int", "-+0123456789"), ("float", "-+.0123456789"), ("null", "nN~"), ("merge", "<")):
    _Loader.add_implicit_resolver(_TAG + _name, _PLAIN[_name], list(_first) + ([""] if _name == "null" else []))


@dataclass
class YamlDocument:
    """`name` is the file as the user wrote it. Marks are (line, column), counted from 1."""

    name: str
    tree: Any = None
    keys: dict[Keys, tuple[int, int]] = field(default_factory=dict)
    values: dict[Keys, tuple[int, int]] = field(default_factory=dict)
    flags: dict[Keys, str] = field(default_factory=dict)
    """Flags of the command line that set a value, by path."""

    def place(self, path: Keys, at_key: bool = False) -> str:
        """Return FILE:LINE:COL of a key or value, or its flag; that of the nearest parent if it does not exist."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.flags:
                return self.flags[path[:end]]
        if path not in self.keys and path not in self.values:  # a flag may have created the mappings around its field
            for flagged, flag in self.flags.items():
                if flagged[: len(path)] == path:
                    return flag
        marks = self.keys if at_key else self.values
        for end in range(len(path), -1, -1):
            mark = marks.get(path[:end]) or self.keys.get(path[:end]) or self.values.get(path[:end])
            if mark:
                return f"{self.name}:{mark[0]}:{mark[1]}"
            marks = self.keys
        return f"{self.name}:1:1"


def read(path: Path, name: str) -> YamlDocument:
    """Read a YAML file. Raises ConfigError with places for anything that is not plain data."""

    def wrong(place: str, message: str, hint: str) -> ConfigError:
        return ConfigError([Problem("", message, hint, place=place)])

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise wrong(name, "found no such file", "create one with `tuneline init`, or name another with `--file`") from None
    except IsADirectoryError:
        raise wrong(name, "found a folder, expected a file", "name the file in it") from None
    except OSError as error:
        raise wrong(name, f"the file cannot be read: {error.strerror}", "check its name and its permissions") from None
    if len(data) > MAX_BYTES:
        raise wrong(name, f"found more than {MAX_BYTES // 1_000_000} MB", "name the pipelines file with `--file`")
    try:
        return parse(data.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"the byte {data[error.start]:#04x}, which is not UTF-8"
        raise wrong(f"{name}:{line}:{column}", f"found {found}, expected a file in UTF-8", "save the file as UTF-8") from None


def parse(text: str, name: str) -> YamlDocument:
    """Parse a text; the tree is None if it is empty. Raises ConfigError with places for anything that is not plain data."""
    source, problems = YamlDocument(name), list[Problem]()
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line, column, message, hint = syntax(error, text)
        raise ConfigError([Problem("", message, hint, place=f"{name}:{line}:{column}")]) from None
    except yaml.reader.ReaderError as error:
        start = text.rfind("\n", 0, error.position)
        place = f"{name}:{text.count(chr(10), 0, error.position) + 1}:{error.position - start}"
        raise ConfigError([_control_character(place, "", chr(error.character))]) from None
    except RecursionError:
        raise ConfigError(
            [Problem("", f"found more than {MAX_DEPTH} levels of nesting", "reduce the nesting", place=f"{name}:1:1")]
        ) from None
    with contextlib.suppress(_Stop):
        source.tree = None if node is None else _Builder(source, problems).build(node, (), 0)
    if problems:
        raise ConfigError(problems)
    return source


def _control_character(place: str, path: str, character: str) -> Problem:
    return Problem(path, f"found the control character U+{ord(character):04X}", "remove it: the file must be plain text", place=place)


class _Stop(Exception):
    """Stop reading the rest of the file."""


class _Builder:
    def __init__(self, source: YamlDocument, problems: list[Problem]):
        self.source, self.problems, self.nodes = source, problems, 0

    def _problem(self, node: yaml.Node, path: Keys, message: str, hint: str) -> None:
        place = f"{self.source.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        self.problems.append(Problem(dotted(path), message, hint, place=place))

    def build(self, node: yaml.Node, path: Keys, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            what = (
                f"more than {MAX_DEPTH} levels of nesting"
                if depth > MAX_DEPTH
                else f"more than {MAX_NODES} values once aliases are expanded"
            )
            self._problem(node, path[:6], f"found {what}", "reduce nesting and aliases; an alias inside its own anchor never ends")
            raise _Stop
        self.source.values.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.ScalarNode) and node.tag.startswith(_TAG):
            return self._scalar(node, path, node.tag.removeprefix(_TAG))
        return self._tag(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: Keys, kind: str) -> Any:
        text = str(node.value)
        if kind in ("str", "merge"):  # `<<` as a value is text
            return self._text(node, path)
        if kind not in _PLAIN or not _PLAIN[kind].match(text):  # an explicit tag
            return self._tag(node, path)
        value = yaml_value(text)
        if kind == "int" and value is None:
            return self._no_number(node, path, f"a whole number of {len(text.lstrip('+-0'))} digits", f"at most {MAX_DIGITS}")
        if kind == "float" and value is None:
            return self._no_number(node, path, short(text), "finite numbers")
        return value

    def _no_number(self, node: yaml.Node, path: Keys, found: str, expected: str) -> None:
        self._problem(node, path, f"found {found}, expected {expected}", "put quotes around it if it is text")

    def _text(self, node: yaml.ScalarNode, path: Keys) -> str:
        control = _CONTROL.search(node.value)
        if control:
            place = f"{self.source.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
            self.problems.append(_control_character(place, dotted(path), control[0]))
        return str(node.value)

    def _tag(self, node: yaml.Node, path: Keys) -> None:
        found = f"found the tag {node.tag.replace(_TAG, '!!')}, expected plain YAML without tags"
        self._problem(node, path, found, "remove the tag")

    def _mapping(self, node: yaml.MappingNode, path: Keys, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                found = f"`{key_node.value}`" if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._problem(key_node, path, f"found {found} as a key, expected text", "put quotes around it if it is a name")
                continue
            key = self._text(key_node, path)
            if key in result:
                first = self.source.keys[(*path, key)][0]
                self._problem(key_node, (*path, key), f"found `{key}` twice, first in line {first}", "keep one of them")
                continue
            self.source.keys.setdefault((*path, key), (key_node.start_mark.line + 1, key_node.start_mark.column + 1))
            result[key] = self.build(value_node, (*path, key), depth + 1)
        for other in merged:
            inherited = self.build(other, path, depth + 1)
            if not isinstance(inherited, dict):
                self._problem(other, path, "found a merge key `<<` without a mapping", "write `<<: *anchor`")
                continue
            result |= {key: value for key, value in inherited.items() if key not in result}
        return result


def yaml_value(text: str) -> Any:
    """Return the value of a plain scalar; None for null and for numbers that JSON cannot represent."""
    kind = next((kind for kind in ("null", "bool", "int", "float") if _PLAIN[kind].match(text)), "str")
    if kind == "int":
        return int(text) if len(text.lstrip("+-0")) <= MAX_DIGITS else None
    if kind == "float":
        return float(text) if text[-1].lower() not in "nf" and math.isfinite(float(text)) else None
    return None if kind == "null" else text[0] in "tT" if kind == "bool" else text


def dotted(path: Keys) -> str:
    """Return `demo.sft.lora.r` for a field of a stage, the path in the file otherwise."""
    shown = list(path)
    if len(shown) >= 2 and shown[0] == "pipelines":
        shown = shown[1:]
        if len(shown) > 2 and shown[1] == "stages":
            del shown[1]
    return ".".join(short(str(part)) for part in shown)
