"""Which files git ignores, and globs in .gitignore syntax.

Implements gitignore(5), because libraries match everything under a matched folder, which git does not: with `*`, `!*/`,
`!*.py` they take every file. Deliberately omitted: machine-specific rules (.git/info/exclude, core.excludesFile).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tuneline.trees.file_memory import Look

IGNORE_FILE = ".gitignore"


FLAGS = re.DOTALL | re.ASCII
WILDCARDS = re.compile(r"[*?\[\\]")


class Patterns:
    """Lines of a .gitignore, or globs in the same syntax: the last match decides."""

    def __init__(self, lines: Iterable[str]):
        self._patterns = [pattern for line in lines if (pattern := parse(line)) is not None]
        # Most names match no pattern; these two detect that faster than one comparison per pattern.
        self._bases = AnyOf(pattern for pattern in self._patterns if pattern.anywhere)
        self._paths = AnyOf(pattern for pattern in self._patterns if not pattern.anywhere)
        self._folders: dict[str, bool] = {"": False}

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def decide(self, name: str, is_folder: bool) -> bool | None:
        """Return True if a pattern matches, False if a `!` pattern does, None if none does."""
        path = name if name.isascii() else as_bytes(name)
        base = path.rpartition("/")[2]
        if not self._bases.matches(base) and not self._paths.matches(path):
            return None
        for pattern in reversed(self._patterns):
            if (is_folder or not pattern.folders_only) and re.fullmatch(pattern.expression, base if pattern.anywhere else path, FLAGS):
                return not pattern.negated
        return None

    def covers(self, name: str) -> bool:
        """Return whether the file matches; if no pattern decides about it, whether its nearest decided parent folder does."""
        said = self.decide(name, False)
        return self._covers_folder(name.rpartition("/")[0]) if said is None else said

    def _covers_folder(self, name: str) -> bool:
        if name not in self._folders:
            said = self.decide(name, True)
            self._folders[name] = self._covers_folder(name.rpartition("/")[0]) if said is None else said
        return self._folders[name]


class Pattern(NamedTuple):
    negated: bool
    folders_only: bool
    anywhere: bool
    """Has no slash: it is compared with the last part of a path."""
    glob: str
    expression: str


class AnyOf:
    """Match any of several patterns with few comparisons: most globs are a name, or `*` and an ending."""

    def __init__(self, patterns: Iterable[Pattern]):
        names, endings, others = set[str](), list[str](), list[str]()
        for pattern in patterns:
            if not WILDCARDS.search(pattern.glob):
                names.add(pattern.glob)
            elif pattern.anywhere and pattern.glob[0] == "*" and not WILDCARDS.search(pattern.glob, 1):
                endings.append(pattern.glob[1:])
            else:
                others.append(f"(?:{pattern.expression})")
        self._names, self._endings, self._others = names, tuple(endings), re.compile("|".join(others) or "(?!)", FLAGS)

    def matches(self, name: str) -> bool:
        return name in self._names or name.endswith(self._endings) or self._others.fullmatch(name) is not None


TRAILING_SPACES = re.compile(r"^((?:[^\\]|\\.)*?) +$", re.DOTALL)  # except one after a backslash


def parse(line: str) -> Pattern | None:
    """Return the pattern of a line; None for a comment, an empty line, or a pattern that git never matches."""
    line = TRAILING_SPACES.sub(r"\1", as_bytes(line).removesuffix("\r"))
    if not line or line.startswith("#"):
        return None
    negated = line.startswith("!")
    line = line[negated:]
    folders_only = line.endswith("/")
    line = line.removesuffix("/")
    glob = line.removeprefix("/")
    expression = glob_expression(glob)
    if not line or expression is None:
        return None
    return Pattern(negated, folders_only, "/" not in line, glob, expression)


def as_bytes(text: str) -> str:
    """Return the text with one character per byte, because git's wildcards match bytes."""
    return os.fsencode(text).decode("latin-1")


def glob_expression(glob: str) -> str | None:
    """Return the regular expression of a glob: wildcards stop at `/`, except `**` as a whole path component. None if invalid."""
    expression, position = "", 0
    while position < len(glob):
        char = glob[position]
        if char == "*":
            end = position
            while glob[end : end + 1] == "*":
                end += 1
            whole = end - position >= 2 and glob[position - 1 : position] in ("", "/") and glob[end : end + 1] in ("", "/")
            if whole and end == len(glob):
                expression += ".+" if position else ".*"
            elif whole:
                expression, end = expression + "(?:.*/)?", end + 1
            else:
                expression += "[^/]*"
            position = end
        elif char == "[":
            bracket = bracket_expression(glob, position)
            if bracket is None:
                return None
            expression, position = expression + bracket[0], bracket[1]
        else:
            if char == "\\":
                position += 1
                if position == len(glob):
                    return None
            expression += "[^/]" if char == "?" else re.escape(glob[position])
            position += 1
    return expression


CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "blank": " \\t", "digit": "0-9", "lower": "a-z", "space": "\\s", "upper": "A-Z",
    "xdigit": "0-9a-fA-F", "punct": re.escape("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"),
}  # fmt: skip


def bracket_expression(glob: str, start: int) -> tuple[str, int] | None:
    """Return (`[...]` as a regular expression, the position after it); None if it is never closed."""
    position = start + 1
    negated = glob[position : position + 1] in ("!", "^")
    position += negated
    first, items = position, ""
    while position < len(glob):
        char = glob[position]
        if char == "]" and position > first:
            # Brackets never match `/`; empty ranges such as [z-a] match nothing.
            body = f"[^{items}]" if negated and items else "." if negated else f"[{items}]" if items else "(?!)"
            return f"(?!/){body}", position + 1
        end = glob.find("]", position + 2)
        if glob.startswith("[:", position) and end > position + 2 and glob[end - 1] == ":":
            if glob[position + 2 : end - 1] not in CLASSES:
                return None
            items, position = items + CLASSES[glob[position + 2 : end - 1]], end + 1
            continue
        low, position = bracket_char(glob, position)
        if glob[position : position + 1] == "-" and glob[position + 1 : position + 2] not in ("", "]"):
            high, position = bracket_char(glob, position + 1)
            items += f"{re.escape(low)}-{re.escape(high)}" if low <= high else ""
        else:
            items += re.escape(low)
    return None


def bracket_char(glob: str, position: int) -> tuple[str, int]:
    escaped = glob[position] == "\\" and position + 1 < len(glob)
    return glob[position + escaped], position + escaped + 1


Rules = list[tuple[str, Patterns]]  # (folder ending in `/`, patterns of its .gitignore), outermost first


def ignored(name: str, is_folder: bool, rules: Rules) -> bool:
    """Return whether git ignores a name: the innermost .gitignore with a match decides. Callers must not enter ignored folders."""
    for prefix, patterns in reversed(rules):
        decision = patterns.decide(name.removeprefix(prefix), is_folder)
        if decision is not None:
            return decision
    return False


def ignore_files_above(folder: Path, look: Look) -> tuple[str, Rules]:
    """Return (the folder's path in its repository, rules of its parent folders); both empty outside of a repository."""
    folder = Path(os.path.realpath(folder))
    top = top_of(folder, look)
    parts = folder.relative_to(top).parts
    prefixes = ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts))]
    files = [(prefix, str(top / prefix / IGNORE_FILE)) for prefix in prefixes]
    rules = [(prefix, read_ignore_file(file)) for prefix, file in files if look.stat(file) and is_plain(file)]
    # If the named folder is itself ignored, such as a corpus that is kept out of git, its content is wanted.
    named = any(ignored("/".join(parts[:depth]), True, rules) for depth in range(1, len(parts) + 1))
    return "".join(f"{part}/" for part in parts), [] if named else rules


def top_of(folder: Path, look: Look) -> Path:
    """Return the top folder of the repository around `folder`; the folder itself if there is none."""
    return next((place for place in (folder, *folder.parents) if look.stat(str(place / ".git"))), folder)


def is_plain(file: str) -> bool:
    """Return whether a file is not a link: git does not follow links to ignore files."""
    return os.path.isfile(file) and not os.path.islink(file)


def read_ignore_file(file: str) -> Patterns:
    return Patterns(os.fsdecode(Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf")).split("\n"))
