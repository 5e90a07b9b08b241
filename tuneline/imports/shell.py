"""The commands of a shell script: words with their lines, variables replaced, nothing executed.

It reads what people write around a training command: quotes, continued lines, comments, `NAME=value`, arrays, `${NAME:-default}`,
prefixes of variables, redirections and `&&`. What only a shell could compute (`$(...)`, `$1`) stays in the word as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tuneline.errors import ConfigError, Problem

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?=)(.*)", re.DOTALL)
VARIABLE = re.compile(r"([A-Za-z_]\w*)(\[[@*]\])?(?::?[-=]([^{}]*))?$", re.DOTALL)
NAME = re.compile(r"[A-Za-z_]\w*")
KEYWORDS = (
    "if",
    "then",
    "else",
    "elif",
    "fi",
    "for",
    "do",
    "done",
    "while",
    "case",
    "esac",
    "function",
    "{",
    "}",
    "!",
    "time",
    "nohup",
    "exec",
)
ENDS = ("\n", ";", "&", "|", "(", ")")


@dataclass(frozen=True)
class Word:
    text: str
    line: int
    operator: bool = False


@dataclass(frozen=True)
class Command:
    """A command: its words, and the variables that are set for it alone."""

    words: tuple[Word, ...]
    environment: dict[str, Word] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        return [word.text for word in self.words]


@dataclass
class Script:
    commands: list[Command] = field(default_factory=list)
    variables: dict[str, list[Word]] = field(default_factory=dict)
    """Every variable that the script sets: its value, or the items of an array."""


def read_script(text: str, name: str) -> Script:
    """Read a script, or one command. Raises ConfigError for a quote or bracket that is never closed."""
    script = Script()
    words: list[Word] = []
    for word in _Words(text, name, script.variables):
        if word.operator and word.text in ENDS:
            _finish(words, script)
            words = []
        else:
            words.append(word)
    _finish(words, script)
    return script


def _finish(words: list[Word], script: Script) -> None:
    """Add one command to the script, or its assignments."""
    plain = list(_without_redirections(words))
    while plain and plain[0].text in (*KEYWORDS, "export", "declare", "local", "readonly", "env"):
        plain = plain[1:]
    environment: dict[str, Word] = {}
    while plain and (match := ASSIGNMENT.fullmatch(plain[0].text)):
        environment[match[1]] = Word(match[3], plain[0].line)
        plain = plain[1:]
    if plain:
        script.commands.append(Command(tuple(plain), environment))
    else:
        script.variables.update((name, [word]) for name, word in environment.items())


def _without_redirections(words: list[Word]) -> Iterator[Word]:
    """Yield the words but `> file`, `2>&1` and the like."""
    dropped = False
    for i, word in enumerate(words):
        follows = i + 1 < len(words) and words[i + 1].operator
        if word.operator:
            dropped = True
        elif dropped:
            dropped = False
        elif not (follows and word.text in ("1", "2")):
            yield word


class _Words:
    """Iterates over the words of a text. Variables are looked up when a word is read, so earlier lines have set them."""

    def __init__(self, text: str, name: str, variables: dict[str, list[Word]]) -> None:
        self.text, self.name, self.variables = text.replace("\r\n", "\n"), name, variables
        variables.setdefault("HOME", [Word("~", 1)])
        self.at, self.line = 0, 1

    def __iter__(self) -> Iterator[Word]:
        while self.at < len(self.text):
            character = self.text[self.at]
            if character in " \t\r":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self._skip(2)
            elif character == "#":
                self._comment()
            elif character in "\n;&|()<>":
                yield from self._operator(character)
            else:
                yield from self._word()

    def _operator(self, character: str) -> Iterator[Word]:
        line = self.line
        self._skip(1)
        if character in "<>" and self.text[self.at : self.at + 1] in ("&", ">", "<"):
            self._skip(1)
        yield Word(character, line, operator=True)

    def _comment(self) -> None:
        """Skip a comment. One that ends with a backslash, between the lines of a command, is a line that somebody took out."""
        end = self.text.find("\n", self.at)
        end = len(self.text) if end < 0 else end
        continued = self.text[self.at : end].rstrip().endswith("\\")
        self.at = end
        if continued and end < len(self.text):
            self._skip(1)

    def _word(self) -> Iterator[Word]:
        parts, line, quoted = [""], self.line, False
        while self.at < len(self.text) and self.text[self.at] not in " \t\r\n;&|()<>":
            character = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self._skip(2)
            elif character == "\\":
                parts[-1] += self.text[self.at + 1 : self.at + 2]
                self._skip(2)
            elif character == "'":
                quoted = True
                parts[-1] += self._until("'")
            elif character == '"':
                quoted = True
                values = self._double()
                parts[-1] += values[0] if values else ""
                parts += values[1:]
            elif character in "$`":
                values = self._variable()
                pieces = [piece for value in values for piece in (value.split() or [""])]
                parts[-1] += pieces[0] if pieces else ""
                parts += pieces[1:]
            else:
                parts[-1] += character
                self._skip(1)
        array = ASSIGNMENT.fullmatch(parts[-1]) if self.text[self.at : self.at + 1] == "(" else None
        if array and not array[3]:
            self._array(array[1], array[2] == "+=", line)
            return
        yield from (Word(part, line) for part in parts if part or quoted)

    def _array(self, name: str, more: bool, line: int) -> None:
        self._skip(1)
        items: list[Word] = []
        for word in self:
            if word.operator and word.text == ")":
                self.variables[name] = [*self.variables.get(name, []), *items] if more else items
                return
            if not word.operator:
                items.append(word)
        raise self._unclosed("(", line)

    def _double(self) -> list[str]:
        """Return the values of a text in double quotes: one, unless an array is in it."""
        line = self.line
        self._skip(1)
        parts = [""]
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == '"':
                self._skip(1)
                return parts
            if character == "\\" and self.text[self.at + 1 : self.at + 2] in ('"', "\\", "$", "`", "\n"):
                parts[-1] += self.text[self.at + 1].strip("\n")
                self._skip(2)
            elif character in "$`":
                values = self._variable()
                parts[-1] += values[0] if values else ""
                parts += values[1:]
            else:
                parts[-1] += character
                self._skip(1)
        raise self._unclosed('"', line)

    def _variable(self) -> list[str]:
        """Return the values of `$NAME`, `${NAME}` or `$(...)`; the text itself if it is unknown."""
        if self.text[self.at] == "`":
            return ["$(" + self._until("`") + ")"]
        if self.text.startswith("${", self.at):
            inner = self._bracketed("{", "}")
            match = VARIABLE.match(inner)
            known = self.variables.get(match[1]) if match else None
            if match and known is not None:
                return [word.text for word in known] if match[2] else [word.text for word in known[:1]]
            return [match[3]] if match and match[3] is not None else ["${" + inner + "}"]
        if self.text.startswith("$(", self.at):
            return ["$(" + self._bracketed("(", ")") + ")"]
        name = NAME.match(self.text, self.at + 1)
        if name is None:
            self._skip(1)
            special = self.text[self.at : self.at + 1]
            if special in ("'", '"') or not special or special.isspace():
                return ["" if special in ("'", '"') else "$"]
            self._skip(1)
            return ["" if special in "@*" else f"${special}"]
        self._skip(1 + len(name[0]))
        known = self.variables.get(name[0])
        return [word.text for word in known[:1]] if known is not None else [f"${name[0]}"]

    def _bracketed(self, opening: str, closing: str) -> str:
        """Return the text between brackets, from `$` on."""
        line, depth, start = self.line, 0, self.at + 2
        for end in range(self.at + 1, len(self.text)):
            depth += {opening: 1, closing: -1}.get(self.text[end], 0)
            if depth == 0:
                self._skip(end + 1 - self.at)
                return self.text[start:end]
        raise self._unclosed(opening, line)

    def _until(self, quote: str) -> str:
        end = self.text.find(quote, self.at + 1)
        if end < 0:
            raise self._unclosed(quote, self.line)
        inner = self.text[self.at + 1 : end]
        self._skip(end + 1 - self.at)
        return inner

    def _skip(self, characters: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + characters)
        self.at += characters

    def _unclosed(self, opening: str, line: int) -> ConfigError:
        found = f"found `{opening}` that is never closed"
        return ConfigError([Problem("", found, "close it, or import the command alone", place=f"{self.name}:{line}:1")])
