"""What cards say that others than their writer read: the tag by which the folder of an earlier export is recognized, the author's text,
and a license."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tuneline.workspace.file_names import CARD

TAG = "tuneline"
HEAD = "## Intended use"
TO_BE_WRITTEN = "*To be written by the author: what the model is for, what it should not be used for, and what is known of its risks.*"
_METADATA = re.compile(r"\A---\n(.*?)^---$", re.MULTILINE | re.DOTALL)
SECTIONS = ("Data", "Training", "Results", "How it was made")
"""Heads of what follows. The author's text may have other heads, and code with lines like heads."""
_SECTION = re.compile(rf"^{HEAD}\n+(.*?)\s*(?=^## (?:{'|'.join(SECTIONS)})$|\Z)", re.MULTILINE | re.DOTALL)


def is_export(folder: Path) -> bool:
    """Return whether a folder has a model card with our tag in its metadata."""
    try:
        found = _METADATA.match((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return bool(found and re.search(rf"^\s*- {TAG}$", found[1], re.MULTILINE))


def author_text(card: str) -> str | None:
    """Return what an author has written under `Intended use`; None if it is still to be written."""
    found = _SECTION.search(card)
    return found[1] if found and found[1] not in ("", TO_BE_WRITTEN) else None


def with_author_text(card: str, text: str | None) -> str:
    """Return the card with the author's text in place of what is to be written."""
    return card.replace(TO_BE_WRITTEN, text, 1) if text else card


def license_name(license: Mapping[str, str] | None) -> str | None:
    """Return the name of a license as manifests record it: `license`, and for one that is none of the hub's, `license_name`."""
    return (license.get("license_name") or license["license"]) if license else None
