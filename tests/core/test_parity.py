"""docs/parity.md names tests: each must exist."""

from __future__ import annotations

import re

from project import ROOT

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(?:(core|flow)/)?(\w+)::(test_\w+)`")


def test_the_tests_that_the_page_names_exist() -> None:
    assert len(NAMED.findall(PAGE)) > 50
    for folder, file, test in NAMED.findall(PAGE):
        path = ROOT / "tests" / (folder or "program") / f"test_{file}.py"
        assert path.is_file(), path
        assert f"\ndef {test}(" in path.read_text(encoding="utf-8"), (path.name, test)
