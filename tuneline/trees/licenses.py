"""Detect the license of a file in a source tree, by SPDX lines and the texts of license files.

Deliberately omitted: licenses named in package.json and the like, and REUSE's side files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tuneline.kinds.sources import LANGUAGES
from tuneline.trees.file_memory import Look, Reading, digest_of_code
from tuneline.trees.gitignore import top_of

HEAD = 2000  # characters that are searched for a header
SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() \t-]+)")
LICENSE_FILE = re.compile(r"(un)?licen[cs]e([-_.][\w.-]+)?|copying([-_.][\w.-]+)?", re.IGNORECASE)
# Phrases that identify a license text, in lower case, with single spaces.
LICENSE_TEXTS: tuple[tuple[str, str, str], ...] = (  # SPDX name, what the text must contain, what it must not
    ("Apache-2.0", r"apache license,? version 2\.0, january 2004", ""),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation"
            r".*the above copyright notice and this permission notice", r"except as contained in this notice, the name"),
    ("MIT-0", r"permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation",
              r"this permission notice"),
    ("BSD-4-Clause", r"redistribution and use in source and binary forms.*all advertising materials", ""),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.*(neither the name|may not be used to endorse)",
                     r"all advertising materials"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms",
                     r"neither the name|may not be used to endorse|all advertising materials"),
    ("ISC", r"permission to use, copy, modify,? and(/or)? distribute this software.*provided that the above copyright notice", ""),
    ("0BSD", r"permission to use, copy, modify,? and(/or)? distribute this software", r"provided that the above copyright notice"),
    ("AGPL-3.0-only", r"gnu affero general public license version 3, 19 november 2007", ""),
    ("LGPL-3.0-only", r"gnu lesser general public license version 3, 29 june 2007", ""),
    ("LGPL-2.1-only", r"gnu lesser general public license version 2\.1, february 1999", ""),
    ("GPL-3.0-only", r"gnu general public license version 3, 29 june 2007", ""),
    ("GPL-2.0-only", r"gnu general public license version 2, june 1991", ""),
    ("MPL-2.0", r"mozilla public license,? version 2\.0", r"apache license,? version 2\.0, january"),
    ("EPL-2.0", r"eclipse public license - v 2\.0", ""),
    ("Unlicense", r"this is free and unencumbered software released into the public domain", ""),
    ("CC0-1.0", r"cc0 1\.0 universal", ""),
    ("BSL-1.0", r"boost software license - version 1\.0", ""),
    ("Zlib", r"altered source versions must be plainly marked as such", ""),
)  # fmt: skip


class Licenses:
    """Find the license of a file: its own SPDX line, else that of the nearest parent folder with a license file."""

    def __init__(self, folder: Path, allowed: Sequence[str], look: Look):
        self._folder, self._look, self._allowed = folder, look, frozenset(name.lower() for name in allowed)
        self._files: dict[str, list[str]] = {}  # license files by folder in the tree
        self._known: dict[str, list[str] | None] = {}
        self._refusals: dict[tuple[str | None, str], str | None] = {}  # by header, or by folder if there is none

    def enter(self, folder: str, entries: Iterable[os.DirEntry[str]]) -> None:
        """Register the entries of a folder. Call it before `refusal` for the folder's files."""
        if self._allowed:
            self._files[folder] = license_files(entries)

    def refusal(self, name: str, header: str | None) -> str | None:
        """Return why a file with this SPDX line is skipped, or None. Without a list of licenses every file is allowed."""
        if not self._allowed:
            return None
        asked = (header, name.rpartition("/")[0] if header is None else "")
        if asked not in self._refusals:
            self._refusals[asked] = self._refusal(*asked)
        return self._refusals[asked]

    def _refusal(self, header: str | None, folder: str) -> str | None:
        if header is not None:
            return None if allows(header, self._allowed) else f"license {header}"
        found = self._around(folder)
        if not found:
            return "license unknown"
        refused = [license for license in found if not allows(license, self._allowed)]  # with several texts, all of them apply
        return f"license {' and '.join(refused)}" if refused else None

    def _around(self, folder: str) -> list[str] | None:
        """Return the licenses of the nearest folder that has license files; empty if one of them is unknown."""
        if folder not in self._known:
            if self._files[folder]:
                known = [self._look.read(RECOGNISED, file, self._look.file(file)) for file in self._files[folder]]
                self._known[folder] = sorted({name for names in known for name in names}) if all(known) else []
            else:
                self._known[folder] = self._around(folder.rpartition("/")[0]) if folder else self._above()
        return self._known[folder]

    def _above(self) -> list[str] | None:
        """Return the licenses of the folders above the tree, up to the top of its repository."""
        folder = Path(os.path.realpath(self._folder))
        if top_of(folder, self._look) == folder:
            return None
        above = Licenses(folder.parent, tuple(self._allowed), self._look)
        above.enter("", self._look.entries(str(folder.parent)))
        return above._around("")


def license_files(entries: Iterable[os.DirEntry[str]]) -> list[str]:
    return [
        entry.path
        for entry in entries
        if LICENSE_FILE.fullmatch(entry.name) and entry.name.rpartition(".")[2] not in LANGUAGES and entry.is_file(follow_symlinks=False)
    ]


def spdx_line(text: str) -> str | None:
    """Return the license named by an SPDX line in the head of a text."""
    header = SPDX.search(text[:HEAD])
    return header[1].strip() if header else None


def recognised(text: str) -> list[str]:
    header = spdx_line(text)
    if header is not None:
        return [header]
    normalized = " ".join(re.sub(r"[\"“”'`>*#=_]+", " ", text.lower()).split())
    if "commons clause" in normalized:  # it revokes rights of the license that it is added to
        return []
    return [
        name for name, says, says_not in LICENSE_TEXTS if re.search(says, normalized) and not (says_not and re.search(says_not, normalized))
    ]


def _recognised_in(file: str) -> list[str]:
    return recognised(Path(file).read_text(encoding="utf-8", errors="replace"))


RECOGNISED = Reading("license", digest_of_code(__file__), _recognised_in)


def allows(expression: str, allowed: frozenset[str]) -> bool:
    """Return whether the allowed licenses satisfy an SPDX expression: one side of OR, both of AND; exceptions only add rights."""
    tokens = re.findall(r"[()]|[\w.+-]+", expression)

    def either() -> bool:
        met = both()
        while tokens and tokens[0].upper() == "OR":
            tokens.pop(0)
            met = both() or met
        return met

    def both() -> bool:
        met = single()
        while tokens and tokens[0].upper() == "AND":
            tokens.pop(0)
            met = single() and met
        return met

    def single() -> bool:
        token = tokens.pop(0) if tokens else ""
        if token == "(":
            met = either()
            return bool(tokens) and tokens.pop(0) == ")" and met
        met = token.lower() in allowed
        if tokens and tokens[0].upper() == "WITH":
            met = f"{token} WITH {tokens[1] if len(tokens) > 1 else ''}".lower() in allowed or met
            del tokens[:2]
        return met

    return either() and not tokens
