"""Patched parts of libraries: docs/patches.md lists each, and a missing one is an error."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tuneline import patches
from tuneline.patches import patch

ROOT = Path(patches.__file__).parent.parent


def test_what_is_not_there_is_not_replaced() -> None:
    class Library:
        old = 1

    patch(Library, "old", 2)
    assert Library.old == 2
    with pytest.raises(RuntimeError, match="found no `new` in Library to replace: .*docs/patches.md"):
        patch(Library, "new", 2)
    with pytest.raises(RuntimeError, match="found no `new` in Library to replace"):
        patch(Library(), "new", 2)


def test_the_page_lists_every_patch() -> None:
    page = (ROOT / "docs" / "patches.md").read_text(encoding="utf-8")
    files = [*(ROOT / "flows").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    calls = [
        (file.relative_to(ROOT).as_posix(), node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "patch"
    ]
    found = {(file, ast.literal_eval(call.args[1])) for file, call in calls}
    assert len(found) > 8
    assert [(file, name) for file, name in sorted(found) if f"`{file}" not in page or not re.search(rf"\b{name}\b", page)] == []
