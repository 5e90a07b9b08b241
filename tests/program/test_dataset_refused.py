"""Program `dataset`: rows, files and sources that are refused by their place, or dropped and counted. Needs the torch runtime."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import build, build_rows, sums, write_file

from tuneline.errors import StageFailed

GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_ROWS = [
    ("d.jsonl", GOOD + "{oops}\n", r"d\.jsonl:2: found no JSON \(Expecting property name"),
    ("d.jsonl", GOOD + "\n[1, 2]\n", r"d\.jsonl:3: found a list of 2, allowed an object"),
    (
        "d.jsonl",
        '{"question": "a", "reply": "b"}\n',
        r"d\.jsonl:1: found columns question, reply, allowed messages, or conversations, or inst",
    ),
    (
        "d.jsonl",
        GOOD + '{"prompt": "a"}\n',
        r"d\.jsonl:2: found no completion \(columns: prompt\), allowed for format prompt_completion: prompt,",
    ),
    ("d.jsonl", GOOD + '{"text": "a"}\n', r"d\.jsonl:2: found no prompt \(columns: text\)"),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": " \\n"}\n', r"d\.jsonl:2: completion: found empty text, allowed text with content"),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": 5}\n', r"d\.jsonl:2: found prompt as 'a', completion as int 5, allowed both text or"),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": "\\ud800"}\n', r"d\.jsonl:2: completion: found half a surrogate pair"),
    ("d.jsonl", '{"text": ["a"]}\n', r"d\.jsonl:1: text: found a list of 1, allowed text"),
    ("d.jsonl", '{"messages": []}\n', r"d\.jsonl:1: messages: found an empty list, allowed a list of messages"),
    ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', r"d\.jsonl:1: the last message is from user, allowed assistant"),
    ("d.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', r"d\.jsonl:1: found no message from user"),
    ("d.jsonl", '{"prompt": [{"role": "assistant", "content": "a"}], "answer": "b"}\n', r"d\.jsonl:1: found no message from user"),
    ("d.jsonl", '{"prompt": "a"}\n', r"d\.jsonl:1: found a prompt alone, allowed one with completion, or with answer, tests, extra"),
    ("d.jsonl", '{"prompt": "a", "extra": {}}\n', r"d\.jsonl:1: found a prompt alone"),
    ("d.jsonl", '{"prompt": "a", "answer": "b", "extra": 3}\n', r"d\.jsonl:1: extra: found int 3, allowed an object"),
    (
        "d.jsonl",
        '{"prompt": "a", "extra": {"id": 3}}\n',
        r"d\.jsonl:1: extra: found id, allowed names other than prompts, completions, id,",
    ),
    ("d.jsonl", '{"prompt": "a", "tests": NaN}\n', r"d\.jsonl:1: extra, tests: found what JSON cannot hold \(Out of range float"),
    ("d.jsonl", '{"prompt": "a", "tests": "\\ud800"}\n', r"d\.jsonl:1: extra, tests: found what JSON cannot hold \('utf-8' codec"),
    (
        "d.jsonl",
        '{"messages": [{"role": "bot", "content": "a"}]}\n',
        r"d\.jsonl:1: messages\[0\]\.role: found 'bot', allowed system, user,",
    ),
    ("d.jsonl", '{"messages": [{"role": "user"}]}\n', r"d\.jsonl:1: messages\[0\]\.content: found nothing, allowed text"),
    ("d.jsonl", '{"messages": ["hello"]}\n', r"d\.jsonl:1: messages\[0\]: found 'hello', allowed an object with role and content"),
    (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]}\n',
        r"d\.jsonl:1: found a system message at position 1, allowed only the first",
    ),
    (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}\n',
        r"d\.jsonl:1: messages\[0\]\.tool_calls: found calls of user, allowed only those of assistant",
    ),
    ("d.jsonl", '{"conversations": [{"from": "me", "value": "a"}]}\n', r"d\.jsonl:1: conversations\[0\]\.from: found 'me', allowed human,"),
    (
        "d.jsonl",
        '{"conversations": [{"role": "user", "content": "a"}]}\n',
        r"d\.jsonl:1: conversations\[0\]: found an object with role, con",
    ),
    (
        "d.jsonl",
        '{"instruction": "a", "output": "b", "history": [["c"]]}\n',
        r"d\.jsonl:1: history\[0\]: found a list of 1, allowed \[quest",
    ),
    (
        "d.jsonl",
        '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
        r"d\.jsonl:1: found prompt as 'a', completion as",
    ),
    ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}], "tools": "["}\n', r"d\.jsonl:1: tools: found text that is no JSON"),
    ("d.json", '[\n{"text": "a"},\n{"text":\n1}]', r"d\.json:3: text: found int 1, allowed text"),
    ("d.json", '[\n{"text": "a"},\n{"text" 1}]', r"d\.json:3: found no JSON \(Expecting ':'"),
    ("d.json", '[{"text": "a"}\n{"text": "b"}]', r"d\.json:2: found no JSON \(Expecting ',' or '\]'"),
    ("d.json", '[{"text": "a"}', r"d\.json:1: found no JSON"),
    ("d.json", '{"text": "a"}\n', r"d\.json:1: found no list, allowed a list of objects"),
    ("d.csv", "prompt,completion\na,b\n\nc\n", r"d\.csv:4: found 1 cells, allowed 2, as in the header"),
    ("d.csv", 'prompt,completion\n"a\nb",c\nd,\n', r"d\.csv:4: found no completion \(columns: prompt\)"),
    ("d.csv", 'prompt,completion\na,"b" c\n', r"d\.csv:2: found no CSV"),
    ("d.csv", "", r"d\.csv:1: found no header"),
    ("d.csv", "prompt,prompt,completion\na,b,c\n", r"d\.csv:1: found the column prompt twice, allowed once"),
    ("d.parquet", "no parquet", r"d\.parquet: found no parquet"),
    ("d.jsonl", "\n", r"the train split is empty: 0 rows in 0 groups are left"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(StageFailed, match=message) as failure:
        build(tmp_path, [{"type": "files", "path": name}])
    assert failure.value.failure_class == "data"


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_never_guessed(tmp_path: Path, encoding: str, on_bad_row: str) -> None:
    """Python's json guesses the encoding of bytes, line by line: rows of UTF-16 were read as others."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    text = mark + "".join(json.dumps({"text": f"ł{i} → ok"}, ensure_ascii=False) + "\n" for i in range(60))
    (tmp_path / "d.jsonl").write_text(text, encoding=encoding)
    with pytest.raises(StageFailed, match=r"d\.jsonl: found UTF-16, allowed UTF-8"):
        build(tmp_path, [{"type": "files", "path": "d.jsonl", "on_bad_row": on_bad_row}])
    (tmp_path / "d.jsonl").write_text(text.removeprefix(mark), encoding="utf-8-sig")
    assert [row.text for row in build(tmp_path, [{"type": "files", "path": "d.jsonl"}]).rows()][0] == "ł0 → ok"


def test_bad_bytes_and_parquet_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(StageFailed, match=r"d\.csv: found bytes that are not UTF-8"):
        build(tmp_path, [{"type": "files", "path": "d.csv"}])
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(StageFailed, match=r"d\.jsonl:2: found no JSON \('utf-8' codec can't decode"):
        build(tmp_path, [{"type": "files", "path": "d.jsonl"}])
    write_file(tmp_path / "d.parquet", [{"text": "a"}, {"text": " "}])
    with pytest.raises(StageFailed, match=r"d\.parquet: row 2: text: found empty text"):
        build(tmp_path, [{"type": "files", "path": "d.parquet"}])


def test_bad_rows_are_dropped_and_counted_where_the_source_says_so(tmp_path: Path) -> None:
    wrong = [content.removeprefix(GOOD) for name, content, message in BAD_ROWS if name == "d.jsonl" and message.startswith(r"d\.jsonl:")]
    assert len(wrong) > 20
    (tmp_path / "a.jsonl").write_text(GOOD + "".join(wrong) + '{"prompt": "c", "completion": "d"}\n', encoding="utf-8")
    (tmp_path / "b.csv").write_text("prompt,completion\ne,f\ng\nh,\ni,j\n", encoding="utf-8")
    run = build(tmp_path, [{"type": "files", "path": "*.*", "on_bad_row": "drop"}])
    assert [(row.prompt, row.completion) for row in run.rows()] == [("a", "b"), ("c", "d"), ("e", "f"), ("i", "j")]
    bad = len(wrong) + 2
    assert run.result.metrics["bad_rows"] == bad
    assert run.result.metrics["rows_read"] == bad + 4
    assert f"| *.* | {bad + 4} | {bad} |" in run.report()
    assert len(run.warnings()) == 2
    assert run.warnings()[0].startswith(f"rows that cannot be read are dropped, the first at {tmp_path / 'a.jsonl'}:2: found no JSON")
    assert run.warnings()[1] == f"more than half of the rows were dropped (bad_rows): {bad} of {bad + 4}"


def test_dropping_bad_rows_excuses_no_broken_file(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, **source: Any) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StageFailed) as failure:
            build(tmp_path, [{"type": "files", "path": name, "on_bad_row": "drop", **source}])
        return failure.value.message

    packed = gzip.compress(GOOD.encode() * 1000)
    assert "data.jsonl.gz: found no whole gzip file" in refused("data.jsonl.gz", packed[:-20])
    assert "data.jsonl.gz: found no whole gzip file" in refused("data.jsonl.gz", packed[:20] + b"nothing" + packed[27:])
    assert "data.jsonl.gz: found no whole gzip file" in refused("data.jsonl.gz", GOOD.encode())
    assert "found columns prompt, completion, but sources.0.columns names qestion" in refused(
        "c.jsonl", GOOD.encode(), columns={"prompt": "qestion"}
    )
    emptied = "the train split is empty: 0 rows in 0 groups are left of 2 that were read (2 could not be read)"
    assert refused("d.jsonl", b"no\nno\n") == emptied


@pytest.mark.parametrize(
    ("source", "failure_class", "message"),
    [
        ({"columns": {"question": "prompt"}}, "config", r"sources\.0\.columns: found question, allowed answer, "),
        (
            {"columns": {"prompt": "qestion"}},
            "data",
            r"data\.jsonl:1: found columns prompt, completion, but sources\.0\.columns names qestion",
        ),
        ({"path": "*.none"}, "data", r"sources\.0\.path: no file matches \*\.none"),
        (
            {"path": "data.txt"},
            "config",
            r"data\.txt: found ending \.txt, allowed \.jsonl, \.json, \.csv \(each also with \.gz\), \.parquet",
        ),
    ],
)
def test_bad_sources(tmp_path: Path, source: dict[str, Any], failure_class: str, message: str) -> None:
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(StageFailed, match=message) as failure:
        build_rows(tmp_path, sums(3), source)
    assert failure.value.failure_class == failure_class
