"""The license of a file in a source tree, by SPDX lines and the texts of license files.

Left out on purpose: licenses named in package.json and the like, REUSE's side files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tuneline.data_sources import LANGUAGES
from tuneline.gitignore import top_of

HEAD = 2000  # characters in which a header stands
SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() \t-]+)")
LICENSE_FILE = re.compile(r"(un)?licen[cs]e([-_.][\w.-]+)?|copying([-_.][\w.-]+)?", re.IGNORECASE)
# What the texts of licenses say and no other does, in lower case, words one space apart.
LICENSE_TEXTS: tuple[tuple[str, str, str], ...] = (  # SPDX name, what stands in the text, what does not
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
    """The license of a file: its own SPDX line, else that of the nearest folder with a license file, up to the tree's own."""

    def __init__(self, folder: Path, allowed: Sequence[str]):
        self._folder, self._allowed = folder, frozenset(name.lower() for name in allowed)
        self._known: dict[str, list[str] | None] = {}  # by folder

    def refusal(self, name: str, text: str) -> str | None:
        """Why the file is not read. With no list of licenses everything is."""
        if not self._allowed:
            return None
        header = SPDX.search(text[:HEAD])
        if header:
            return None if allows(header[1], self._allowed) else f"license {header[1].strip()}"
        found = self._around(os.path.dirname(name))
        if not found:
            return "license unknown"
        refused = [license for license in found if not allows(license, self._allowed)]  # several texts: all of them hold
        return f"license {' and '.join(refused)}" if refused else None

    def _around(self, folder: str) -> list[str] | None:
        """What the license files of the nearest folder say that has any; empty where one of them is not known."""
        if folder not in self._known:
            texts = license_texts(self._folder / folder)
            if texts:
                known = [recognised(text) for text in texts]
                self._known[folder] = sorted({name for names in known for name in names}) if all(known) else []
            else:
                self._known[folder] = self._around(os.path.dirname(folder)) if folder else self._above()
        return self._known[folder]

    def _above(self) -> list[str] | None:
        """Of the folders around the tree, up to the top of its repository."""
        folder = Path(os.path.realpath(self._folder))
        if top_of(folder) == folder:
            return None
        return Licenses(folder.parent, tuple(self._allowed))._around("")


def license_texts(folder: Path) -> list[str]:
    return [
        Path(entry.path).read_text(encoding="utf-8", errors="replace")
        for entry in os.scandir(folder)
        if LICENSE_FILE.fullmatch(entry.name) and entry.name.rpartition(".")[2] not in LANGUAGES and entry.is_file(follow_symlinks=False)
    ]


def recognised(text: str) -> list[str]:
    header = SPDX.search(text[:HEAD])
    if header:
        return [header[1].strip()]
    words = " ".join(re.sub(r"[\"“”'`>*#=_]+", " ", text.lower()).split())
    if "commons clause" in words:  # which takes back what the license around it gives
        return []
    return [name for name, says, says_not in LICENSE_TEXTS if re.search(says, words) and not (says_not and re.search(says_not, words))]


def allows(expression: str, allowed: frozenset[str]) -> bool:
    """Whether an SPDX expression can be met with the allowed licenses: one side of OR, both of AND; exceptions only add rights."""
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
