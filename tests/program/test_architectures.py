"""Architectures of all kinds through the real programs, compared with the table in docs/architectures.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_table import COLUMNS, HERE, TYPES, read, tried, written

# A mixture with a shared expert, layers that are no linear ones, and kernels that read them; what quantizes, and what is refused.
IN_CI = {"qwen2_moe", "gpt2", "mamba"} if "gptq" not in HERE else {"gpt2", "phi3"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in IN_CI else [pytest.mark.full]) for name in TYPES])
def test_the_table_in_the_documents_is_what_happens(tmp_path: Path, name: str) -> None:
    found, documented = tried(tmp_path, [name])[name], read()[name]
    assert found == {column: documented[column] for column in found}, "python tests/support/architecture_table.py"


def test_every_type_works_or_is_refused_beforehand() -> None:
    table = read()
    assert list(table) == list(TYPES)
    assert len(table) >= 29
    assert not [(name, cell) for name, row in table.items() for cell in row.values() if cell == "untried" or cell.startswith("FAILS")]
    assert written(table) in Path(__file__).parents[2].joinpath("docs", "architectures.md").read_text(encoding="utf-8")
    assert all(set(row) == set(COLUMNS) for row in table.values())
