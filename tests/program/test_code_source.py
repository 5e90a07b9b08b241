"""Source trees as data: where files are cut, fill-in-the-middle, held-out files. Needs the torch runtime."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from elsewhere import Elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import save_pico
from program_tools import ROOT, make_request, payload_digest, run_program

from tasks.data.code import FRAME, GRAMMARS, Selected, chunks, code_rows, cut, depths, length
from tasks.data.rows import SPLITS, Row, content_hash, read_split
from tasks.models.loading import load_tokenizer
from tuneline.errors import StageFailed
from tuneline.kinds.sources import CodeSource
from tuneline.trees.file_memory import FileMemory, Look
from tuneline.trees.select import select
from tuneline.workspace.protocol import Input, Request, Tree

QWEN = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture(scope="session")
def words() -> Any:
    from pico import tokenizer

    return tokenizer(whole=True)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Input:
    return Input(path=save_pico(tmp_path_factory.mktemp("pico") / "model", whole=True), digest="0" * 64, type="Model")


def pieces(folder: Path, name: str, text: str, tokenizer: Any, limit: int) -> list[str]:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    lines = [f"{line}\n" for line in text.split("\n")]
    return ["".join(lines[a:b]).strip("\n") for a, b in chunks(lines, depths(file, lines), tokenizer, limit)]


LONG = " = some_rather_long_name + another_rather_long_name_of_a_thing"
FILES = {
    "a.py": (
        'import os\n\nX = """\ndef not_one():\n    pass\n"""\n\n\n# Says why.\n# At length.\n@cached\ndef first(a):\n    b = a\n\n    return b\n\n\n'
        "class Second:\n    one = 1\n\n    def method(self):\n        return 2\n",
        ['import os\n\nX = """', "# Says why.\n# At length.\n@cached\ndef first", "class Second:"],
    ),
    "a.js": (
        "import x from 'y';\nconst a = 1;\n\n/** Says why. */\nexport function first(a) {\n  return [\n    a,\n  ];\n}\n\n"
        "class Second {\n  method() {\n    return 2;\n  }\n}\n",
        ["import x", "/** Says why. */\nexport function first", "class Second"],
    ),
    "a.ts": (
        "type A = { a: string };\n\n// Says why.\nexport function first(a: A): string {\n  return a.a;\n}\n\ninterface Second {\n  b: number;\n}\n",
        ["type A", "// Says why.\nexport function first", "interface Second"],
    ),
    "a.go": (
        'package a\n\nimport "fmt"\n\n// First says why.\nfunc First(a int) int {\n\tfmt.Println(a)\n\n\treturn a\n}\n\nfunc (s *S) Second() {\n\treturn\n}\n',
        ["package a", "// First says why.\nfunc First", "func (s *S) Second"],
    ),
    "a.rs": (
        "use std::fmt;\n\n#[derive(Debug)]\npub struct First {\n    a: u8,\n}\n\nimpl First {\n    fn method(&self) -> u8 {\n        self.a\n    }\n}\n",
        ["use std::fmt", "#[derive(Debug)]\npub struct First", "impl First"],
    ),
    "A.java": (
        "package a;\n\nimport b.C;\n\n/** Says why. */\n@Deprecated\npublic class First {\n  int a;\n}\n\nclass Second {\n  int m() {\n    return 2;\n  }\n}\n",
        ["package a", "/** Says why. */\n@Deprecated\npublic class First", "class Second"],
    ),
    "a.c": (
        "#include <x.h>\n\n/* Says why. */\nstatic int\nfirst(int a)\n{\n\treturn a;\n}\n\nint second(void)\n{\n\treturn 2;\n}\n",
        ["#include <x.h>", "/* Says why. */\nstatic int\nfirst", "int second"],
    ),
    "a.cpp": (
        "#include <x>\nusing namespace std;\n\ntemplate <typename T>\nT first(T a) {\n  return a;\n}\n\nclass Second {\n  int b;\n};\n",
        ["#include <x>", "template <typename T>\nT first", "class Second"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_chunks_begin_where_definitions_do(name: str, words: Any, tmp_path: Path) -> None:
    text, beginnings = FILES[name]
    places = [*map(text.index, beginnings), len(text)]
    least = max(length(text[start:end], words) for start, end in pairwise(places)) + 8
    for limit in range(least, length(text, words) + 60):
        found = pieces(tmp_path, name, text, words, limit)
        assert all(chunk.startswith(tuple(beginnings)) for chunk in found), found
        assert len(found) > 1 or limit > 1.5 * least
    assert len(found) == 1


def test_every_language_has_a_test_of_its_own_grammar() -> None:
    assert {GRAMMARS[name.split(".")[1]][0] for name in FILES} == {package for package, _ in GRAMMARS.values()}
    assert set(GRAMMARS) <= select.__globals__["LANGUAGES"]


def test_a_long_definition_is_cut_between_its_statements(words: Any, tmp_path: Path) -> None:
    body = "".join(f"    if a_{i}:\n        b_{i}{LONG}\n        c_{i}{LONG}\n" for i in range(6))
    found = pieces(tmp_path, "a.py", f"def long(a):\n{body}\n\ndef short():\n    return 1\n", words, 90)
    assert found[0].startswith("def long")
    assert all(chunk.startswith("    if a_") for chunk in found[1:-1])
    assert found[-1].startswith("def short"), "the rest of one function and the next are no chunk"


def test_a_language_without_grammar_is_cut_at_empty_lines(words: Any, tmp_path: Path) -> None:
    block = "".join(f"set x_{i}{LONG}\n" for i in range(3))
    found = pieces(tmp_path, "a.tcl", "\n".join([block] * 5), words, int(2.5 * length(block, words)))
    assert len(found) == 3
    assert all(chunk.startswith("set x_0") for chunk in found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=40), st.integers(1, 60))
def test_cuts_lose_and_repeat_no_line(lines: list[tuple[int, int]], room: int) -> None:
    totals = [0]
    for tokens, _ in lines:
        totals.append(totals[-1] + tokens)
    spans = cut(0, len(lines), totals, [depth for _, depth in lines], room)
    assert [line for start, end in spans for line in range(start, end)] == list(range(len(lines)))
    assert all(totals[end] - totals[start] <= room or end - start == 1 for start, end in spans)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [64, 512])
def test_our_own_sources_come_out_whole_and_within_the_limit(limit: int, words: Any) -> None:
    """Also: that nothing but empty lines is lost between chunks."""
    files = sorted((ROOT / "tuneline").rglob("*.py")) + sorted((ROOT / "flows").rglob("*.py"))
    assert len(files) > 30
    for file in files:
        text = file.read_text(encoding="utf-8")
        found = pieces(ROOT / ".cache", "copy.py", text, words, limit)
        long_lines = [line for line in text.split("\n") if length(line, words) > limit]
        assert sum(length(chunk, words) > limit for chunk in found) <= len(long_lines)
        assert [line for chunk in found for line in chunk.split("\n") if line.strip()] == [
            line for line in text.split("\n") if line.strip()
        ]
    (ROOT / ".cache" / "copy.py").unlink()


# --- the stage --------------------------------------------------------------------------------------------------------


def request_of(folder: Path, tree: Path, model: Input, config: dict[str, Any] | None = None, **source: Any) -> Request:
    described = {"type": "code", "path": tree.name, **source}
    selection = select(tree, CodeSource.model_validate(described), Look(FileMemory(folder / "digests.json")))
    return make_request(
        folder,
        {"kind": "dataset", "model": "base", "sources": [described], "split": {"test": 0.2, "validation": 0.2}, **(config or {})},
        {"model": model},
        files={"sources.0.path": selection.paths()},
        trees={"sources.0.path": Tree(folder=tree, left_out=selection.left_out)},
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Twelve files of three functions each; a copy of one of them; what is left out."""
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    for i in range(12):
        functions = "\n\n".join(f"def f_{i}_{k}(a):\n    b_{i * k}{LONG}\n    return b_{i * k}\n" for k in range(3))
        (folder / ("deep" if i % 2 else ".") / f"m{i}.py").write_text(f'"""Module {i}."""\n\n\n{functions}')
    (folder / "copy.py").write_text((folder / "m0.py").read_text())
    (folder / "m_pb2.py").write_text("x = 1\n")
    (folder / "template.py").write_text('START = "<|im_start|>"\n')
    (folder / "line.py").write_text(f"x = {list(range(300))}\n")
    return folder


def every(request: Request) -> dict[str, list[Row]]:
    return {name: read_split(request.payload, name) for name in SPLITS}


def test_files_are_groups_and_what_is_left_out_is_counted(tree: Path, pico: Input, tmp_path: Path) -> None:
    request = request_of(tmp_path / "run", tree, pico, chunk_length=48)
    result, events = run_program(request)
    splits = every(request)
    files = {name: {row.extra["file"] for row in rows} for name, rows in splits.items()}
    assert all(files.values())
    assert sum(map(len, files.values())) == len(set().union(*files.values())), "a file on two sides"
    assert all(row.group == content_hash(row.extra["file"]) for rows in splits.values() for row in rows)
    assert result.metrics["duplicates"] == 4  # of the copy: what stands before its functions, and three of them
    assert result.metrics["tokens_max"] <= 48
    report = (request.meta / "report.md").read_text()
    assert "Left out of the source trees" in report
    for reason in ("generated (1)", "chunk with a special token (1)", "line over chunk_length (1)"):
        assert reason in report
    row = next(row for rows in splits.values() for row in rows if row.extra["file"] == "deep/m1.py" and "f_1_1" in (row.text or ""))
    text = (tree / "deep" / "m1.py").read_text().split("\n")
    start, end = row.extra["lines"]
    assert "\n".join(text[start - 1 : end]).strip("\n") == row.text
    assert any("f_" in event["message"] for event in events if event["type"] == "sample")


@pytest.mark.slow
def test_same_bytes_in_another_folder_and_process(tree: Path, pico: Input, tmp_path: Path, elsewhere: Elsewhere) -> None:
    first = request_of(tmp_path / "run", tree, pico)
    run_program(first)
    second = request_of(tmp_path / "again", tree.rename(tmp_path / "elsewhere"), pico)
    elsewhere.run(second)
    assert payload_digest(first) == payload_digest(second)


def test_fill_in_the_middle_needs_the_tokens_for_it(tree: Path, pico: Input, tmp_path: Path) -> None:
    with pytest.raises(
        StageFailed, match=r"^sources\.0\.fim_rate: the model's tokenizer has no tokens for fill-in-the-middle\n"
    ) as failure:
        run_program(request_of(tmp_path / "run", tree, pico, fim_rate=0.5))
    assert failure.value.failure_class == "config"
    assert "set `fim_rate: 0`" in failure.value.hint
    assert "<|fim_prefix|> <|fim_suffix|> <|fim_middle|>" in failure.value.hint


def test_fill_in_the_middle_moves_the_middle(tree: Path, tmp_path: Path) -> None:
    from pico import tokenizer

    words = tokenizer(whole=True)
    words.add_special_tokens({"additional_special_tokens": QWEN})
    folder = save_pico(tmp_path / "model", vocabulary=len(words))
    words.save_pretrained(folder)
    model = Input(path=folder, digest="0" * 64, type="Model")
    tokens = [load_tokenizer(model).convert_tokens_to_ids(token) for token in QWEN]
    plain = request_of(tmp_path / "plain", tree, model, chunk_length=96 - FRAME)
    run_program(plain)
    texts = {row.text for rows in every(plain).values() for row in rows}
    request = request_of(tmp_path / "run", tree, model, chunk_length=96, fim_rate=0.5)
    result, _ = run_program(request)
    rows = [row for rows in every(request).values() for row in rows]
    moved = [row for row in rows if QWEN[0] in (row.text or "")]
    assert 0.2 < len(moved) / len(rows) < 0.8
    assert result.metrics["duplicates"] == 3, "a copied file's chunks are moved alike, so they are still duplicates"
    for row in moved:
        prefix, suffix, middle = re.fullmatch("(.*)".join(["", *map(re.escape, QWEN), ""])[4:], row.text or "", re.S).groups()  # type: ignore[union-attr]
        assert prefix + middle + suffix in texts
        ids = words(row.text).input_ids
        assert [token for token in ids if token in tokens] == tokens
        assert len(ids) + 1 <= 96
    assert all(row.text in texts for row in rows if row not in moved)
    assert len({content_hash(row.text) for row in rows}) == len(rows)


def test_the_share_moved_is_the_one_asked_for(words: Any, tmp_path: Path) -> None:
    words.add_special_tokens({"additional_special_tokens": QWEN})
    file = tmp_path / "a.py"
    file.write_text("\n\n".join(f"def f_{i}():\n    return {i}" for i in range(400)))
    source = CodeSource(type="code", path=".", chunk_length=32, fim_rate=0.25)
    rows = list(code_rows(Selected("sources.0", source, tmp_path, [file]), words, 0, Counter()))
    share = sum(QWEN[0] in (row.text or "") for _, row in rows) / len(rows)
    assert len(rows) > 150
    assert 0.15 < share < 0.35
