"""Translate PyYAML's syntax errors, which address its own developers, into messages that name lines, indentations and brackets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from tuneline.wording import short


class Syntax(NamedTuple):
    line: int
    column: int
    message: str
    hint: str


# (part of PyYAML's message, our message, hint)
_SYNTAX = (
    ("\\t", "found a tab, expected spaces", "indent with spaces, not tabs"),
    ("another document", "found a second document after `---`, expected one", "write every pipeline under one `pipelines:`"),
    ("second occurrence", "found an anchor (`&name`) twice", "give each anchor its own name"),
    (
        "mapping values are not allowed",
        "found a `:` that does not end a key",
        "put quotes around text that contains `: `; check the indentation",
    ),
    ("could not find expected ':'", "found a key without `:`", "write `key: value`; check quotes and indentation near this line"),
    ("unexpected end of stream", "found a quote that is never closed", "close it; inside single quotes, write a single quote twice"),
    ("expected <block end>", "found text that does not fit the block around it", "start all fields of a mapping in the same column"),
    ("'<stream end>'", "found the end of the text, expected a value", "close the bracket, brace or quote that was opened"),
    ("expected the node content", "found a comma, bracket or brace, expected a value", "write the value, or put quotes around it"),
    ("'<document start>'", "found text after the end of the document", "check brackets, quotes and indentation in and above this line"),
    ("unknown escape character", "found an invalid backslash escape", "use single quotes, in which a backslash is a plain character"),
    ("cannot start any token", "found a character that cannot start a YAML value", "put quotes around text that starts with @, ` or %"),
    (
        "found undefined alias",
        "found an alias (`*name`) without its anchor",
        "define `&name` before it, or put quotes around text with a `*`",
    ),
)
_LATE = (
    "could not find expected ':'",
    "found unexpected end of stream",
)  # PyYAML reports these far after the key or quote that caused them
_UNCLOSED = re.compile(r"expected ',' or '(.)', but got '(.*)'")
_QUOTED, _OPEN_QUOTE = re.compile(r"\"[^\"]*\"|'[^']*'"), re.compile(r"(?<=[\s\[{,])[\"']")
_OPENERS = {"}": "{", "]": "["}
_TOKENS = {"<stream end>": "the end of the text", "<scalar>": "text"}
_KEY = re.compile(r"(?:- +)*([\w.-]+|'[^']*'|\"[^\"]*\") *")
_ITEM = re.compile(r"(?:- +)+(?=\S)")
_NO_SPACE = re.compile(r"(?:- +)*[\w-]+:[^\s:]\S*")


def syntax(error: yaml.MarkedYAMLError, text: str) -> Syntax:
    """Return the place and words for an error of PyYAML in `text`."""
    mark = error.problem_mark or error.context_mark
    if str(error.problem).startswith(_LATE):
        mark = error.context_mark or mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines()
    return (
        _not_closed(error, lines)
        or _unclosed(error, line, column)
        or _misaligned(error, lines)
        or _key_without_colon(error, lines)
        or Syntax(line, column, *_words(str(error.problem)))
    )


def _words(problem: str) -> tuple[str, str]:
    for part, message, hint in _SYNTAX:
        if part in problem:
            return message, hint
    return f"this is not YAML: {problem}", "check brackets, quotes and indentation near this line"


# --- brackets ---------------------------------------------------------------------------------------------------------


def _unclosed(error: yaml.MarkedYAMLError, line: int, column: int) -> Syntax | None:
    match = _UNCLOSED.match(str(error.problem))
    if not match or not error.context_mark:
        return None
    where = f"in the {'list' if match[1] == ']' else 'mapping'} that begins in line {error.context_mark.line + 1}"
    found = f"found {_TOKENS.get(match[2], f'`{match[2]}`')}, expected `,` or `{match[1]}` {where}"
    return Syntax(line, column, found, "check brackets, commas and quotes from there on")


def _not_closed(error: yaml.MarkedYAMLError, lines: list[str]) -> Syntax | None:
    """Return the last line of the bracket's block, where the closing bracket is missing. The block ends before the first line that is
    indented no deeper than the bracket's own line."""
    match, opened, at = _UNCLOSED.match(str(error.problem)), error.context_mark, error.problem_mark
    if not match or not opened or not at:
        return None
    at_end = match[2] == "<stream end>"
    after = (n for n in range(opened.line + 1, min(at.line + 1, len(lines))) if _has_text(lines[n]))
    most = _indentation(lines[opened.line])
    end = next((n for n in after if _indentation(lines[n]) <= most and lines[n].lstrip()[0] not in "]}"), len(lines) if at_end else None)
    if end is None:
        return None
    last = max(n for n in range(opened.line, end) if n == opened.line or _has_text(lines[n]))
    if quote := _OPEN_QUOTE.search(_QUOTED.sub(lambda found: "_" * len(found[0]), lines[last])):
        return Syntax(last + 1, quote.start() + 1, *_words("unexpected end of stream"))
    opener = f"`{_OPENERS[match[1]]}` in column {opened.column + 1}"
    of = f"its {opener}" if last == opened.line else f"the {opener} of line {opened.line + 1}"
    found = f"found no `{match[1]}` at the end of line {last + 1}, expected one for {of}"
    return Syntax(last + 1, len(lines[last].rstrip()) + 1, found, "close it there; check commas and quotes from the opening bracket on")


# --- indentation ------------------------------------------------------------------------------------------------------


def _misaligned(error: yaml.MarkedYAMLError, lines: list[str]) -> Syntax | None:
    """Return the words for a line that starts in a column where no block around it starts."""
    mark = error.problem_mark
    if not mark or mark.line >= len(lines) or not _starts_line(error, lines[mark.line], mark.column):
        return None
    wrong, items = mark.line, lines[mark.line].lstrip().startswith("- ")
    given, levels = _indentation(lines[wrong]), list(_levels(lines, mark.line, items))
    if not levels:
        return None
    wanted, other = min(levels, key=lambda level: abs(level[0] - given))
    if wanted == given:
        return None
    if not items and (before := _outdented(lines, wrong, other)) is not None:
        wrong, given, wanted, other = other, wanted, given, before
    others = f"the other {'items' if items else 'fields'}{_owner(lines, other, wanted, items)} (line {other + 1})"
    found = f"found line {wrong + 1} indented by {given} {'space' if given == 1 else 'spaces'}, expected {wanted}, as {others}"
    return Syntax(wrong + 1, given + 1, found, f"start all {'items of a list' if items else 'fields of a mapping'} in the same column")


def _outdented(lines: list[str], below: int, line: int) -> int | None:
    """Return the line above `line` that is indented as the one below it, if `line` alone is wrong: a plain value among blocks."""
    text = [n for n in range(below) if _has_text(lines[n])]
    if not _has_value(lines[line]) or text[-1] != line or len(text) < 2 or _indentation(lines[text[-2]]) != _indentation(lines[below]):
        return None
    own = _indentation(lines[line])
    start = next((n for n in reversed(text[:-1]) if _indentation(lines[n]) < own), 0)
    siblings = (n for n in text[:-1] if n > start and _indentation(lines[n]) == own)
    return None if any(_has_value(lines[n]) for n in siblings) else text[-2]


def _has_value(line: str) -> bool:
    """Return whether a line is `key: plain value`."""
    return bool(re.fullmatch(r" *[\w.-]+: +[^\s{\[&*|>#].*", line.rstrip()))


def _starts_line(error: yaml.MarkedYAMLError, line: str, column: int) -> bool:
    """Return whether the error is at the line's first key, so that its indentation is the cause."""
    if "expected <block end>" in str(error.problem):
        return column == _indentation(line)
    return "mapping values are not allowed" in str(error.problem) and bool(_KEY.fullmatch(line[_indentation(line) : column]))


def _levels(lines: list[str], below: int, items: bool) -> Iterator[tuple[int, int]]:
    """Yield (column, line) of every block around the line `below`, the innermost first: of lists if `items`, else of mappings."""
    lowest = _indentation(lines[below]) + 1_000
    for n in range(below - 1, -1, -1):
        line = lines[n]
        if not _has_text(line) or line.lstrip()[0] in "]}":
            continue
        start, item = _indentation(line), _ITEM.match(line.lstrip())
        column = start if items or not item else start + item.end()
        if column < lowest and (item or not items):
            lowest = column
            yield column, n
        if start == 0 and not item:
            return


def _owner(lines: list[str], line: int, column: int, items: bool) -> str:
    """Return ` of `name``, the key whose block starts in `column`, or nothing. Items of a list may start in the column of its key."""
    for above in filter(_has_text, reversed(lines[:line])):
        start = _indentation(above)
        if start < column or (items and start == column and not _ITEM.match(above.lstrip())):
            match = _KEY.match(above.lstrip())
            return f" of `{short(match[1])}`" if match and above.split(" #")[0].rstrip().endswith(":") else ""
    return ""


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _has_text(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


# --- keys -------------------------------------------------------------------------------------------------------------


def _key_without_colon(error: yaml.MarkedYAMLError, lines: list[str]) -> Syntax | None:
    """Return the words for a line `key:value` or `key value`. PyYAML reports it there, or at the first `:` of the next line."""
    problem = str(error.problem)
    if "could not find expected ':'" in problem and error.context_mark:
        n = error.context_mark.line
    elif (
        error.problem_mark
        and error.problem_mark.line < len(lines)
        and _starts_line(error, lines[error.problem_mark.line], error.problem_mark.column)
    ):
        n = next((n for n in range(error.problem_mark.line - 1, -1, -1) if _has_text(lines[n])), -1)
    else:
        return None
    text = lines[n].strip() if 0 <= n < len(lines) else ""
    if _NO_SPACE.fullmatch(text):
        key, _, value = text.partition(":")
        return Syntax(
            n + 1,
            _indentation(lines[n]) + 1,
            f"found `{short(text)}`, expected a space after the `:`",
            f"write `{short(f'{key}: {value}')}`",
        )
    if text and ":" not in text:
        return Syntax(n + 1, _indentation(lines[n]) + 1, *_words("could not find expected ':'"))
    return None
