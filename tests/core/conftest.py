"""Fixtures of the core tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_tools import PIPELINES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipelines.yaml").write_text(PIPELINES)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text('{"text": "a"}\n')
    return tmp_path
