"""Which files git ignores, and globs in the same language.

gitignore(5), written out because libraries match whatever lies under a matched folder, which git does not: with `*`, `!*/`,
`!*.py` they take every file. Left out on purpose: rules that lie on one machine only (.git/info/exclude, core.excludesFile).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path


class Patterns:
    """Lines of a .gitignore, or globs in the same language: the last one that matches decides."""

    def __init__(self, lines: Iterable[str]):
        self._patterns = [pattern for line in lines if (pattern := parse(line)) is not None]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def decide(self, name: str, is_folder: bool) -> bool | None:
        """True: matched; False: matched by a `!` pattern; None: nothing is said of it."""
        encoded = as_bytes(name)
        for negated, folders_only, pattern in reversed(self._patterns):
            if (is_folder or not folders_only) and pattern.fullmatch(encoded):
                return not negated
        return None

    def covers(self, name: str) -> bool:
        """Whether the file, or else the nearest folder around it of which anything is said, is matched."""
        parts = name.split("/")
        said = (self.decide("/".join(parts[:length]), length < len(parts)) for length in range(len(parts), 0, -1))
        return next((matched for matched in said if matched is not None), False)


TRAILING_SPACES = re.compile(r"^((?:[^\\]|\\.)*?) +$", re.DOTALL)  # but for one after a backslash


def parse(line: str) -> tuple[bool, bool, re.Pattern[str]] | None:
    """(negated, folders only, what names match); None for a comment, an empty line, or a pattern that git never matches."""
    line = TRAILING_SPACES.sub(r"\1", as_bytes(line).removesuffix("\r"))
    if not line or line.startswith("#"):
        return None
    negated = line.startswith("!")
    line = line[negated:]
    folders_only = line.endswith("/")
    line = line.removesuffix("/")
    expression = glob_expression(line.removeprefix("/"))
    if not line or expression is None:
        return None
    anywhere = "" if "/" in line else "(?:.*/)?"
    return negated, folders_only, re.compile(anywhere + expression, re.DOTALL | re.ASCII)


def as_bytes(text: str) -> str:
    """One character a byte: git's wildcards know no others."""
    return os.fsencode(text).decode("latin-1")


def glob_expression(glob: str) -> str | None:
    """The regular expression of a glob as git reads it: wildcards stop at `/`, but for `**` as a whole part of the path."""
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
    """(`[...]` as a regular expression, the position after it); None where it is never closed."""
    position = start + 1
    negated = glob[position : position + 1] in ("!", "^")
    position += negated
    first, items = position, ""
    while position < len(glob):
        char = glob[position]
        if char == "]" and position > first:
            # Nothing in brackets matches `/`; empty ranges as [z-a] match nothing, alone or not.
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


Rules = list[tuple[str, Patterns]]  # (folder with `/` at its end, what its .gitignore says), outermost first


def ignored(name: str, is_folder: bool, rules: Rules) -> bool:
    """As git decides: the innermost .gitignore that says anything. Whoever walks does not enter an ignored folder."""
    for prefix, patterns in reversed(rules):
        decision = patterns.decide(name.removeprefix(prefix), is_folder)
        if decision is not None:
            return decision
    return False


def ignore_files_above(folder: Path) -> tuple[str, Rules]:
    """(the folder's place in its repository, rules of the folders around it); nothing where there is no repository."""
    folder = Path(os.path.realpath(folder))
    top = top_of(folder)
    parts = folder.relative_to(top).parts
    prefixes = ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts))]
    read = [(prefix, read_ignore_file(top / prefix)) for prefix in prefixes]
    rules = [(prefix, patterns) for prefix, patterns in read if patterns]
    # Who names a folder that is itself ignored, such as a corpus that is kept out of git, means its content.
    named = any(ignored("/".join(parts[:depth]), True, rules) for depth in range(1, len(parts) + 1))
    return "".join(f"{part}/" for part in parts), [] if named else rules


def top_of(folder: Path) -> Path:
    """Of the repository around it; the folder itself where there is none."""
    return next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)


def read_ignore_file(folder: Path) -> Patterns:
    file = folder / ".gitignore"
    if file.is_symlink() or not file.is_file():  # git follows no link here
        return Patterns(())
    return Patterns(os.fsdecode(file.read_bytes().removeprefix(b"\xef\xbb\xbf")).split("\n"))
