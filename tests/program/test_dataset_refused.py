"""Program `dataset`: rows, files and sources that are refused by their place, or dropped and counted. Needs the torch runtime."""

from __future__ import annotations

import datetime
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_tools import build, build_rows, sums, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.dataset import identified
from tasks.data.formats import KNOWN, detect, to_row
from tasks.data.messages import ROLES
from tasks.data.readers import Records, file_records
from tasks.data.values import DECODER, BadRow, readable
from tuneline.errors import StageFailed


def asked(answer: str, beside: str = '"tools": []') -> str:
    """A line whose answer, or whose columns beside the conversation, are given as JSON."""
    return f'{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", {answer}}}], {beside}}}\n'


GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_ROWS = [
    ("d.jsonl", GOOD + "{oops}\n", r"d\.jsonl:2: found no JSON \(Expecting property name"),
    ("d.jsonl", GOOD + "\n[1, 2]\n", r"d\.jsonl:3: found a list of 2, expected an object"),
    (
        "d.jsonl",
        '{"question": "a", "reply": "b"}\n',
        r"d\.jsonl:1: found columns question, reply, expected chosen and rejected, or messages, or conversations, or inst",
    ),
    (
        "d.jsonl",
        GOOD + '{"prompt": "a"}\n',
        r"d\.jsonl:2: found no completion \(columns: prompt\), expected for format prompt_completion: prompt,",
    ),
    ("d.jsonl", GOOD + '{"text": "a"}\n', r"d\.jsonl:2: found no prompt \(columns: text\)"),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": " \\n"}\n', r"d\.jsonl:2: completion: found empty text, expected text with content"),
    (
        "d.jsonl",
        GOOD + '{"prompt": "a", "completion": true}\n',
        r"d\.jsonl:2: found prompt as 'a', completion as bool True, expected both text or",
    ),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": "\\ud800"}\n', r"d\.jsonl:2: completion: found half a surrogate pair"),
    ("d.jsonl", '{"text": ["a"]}\n', r"d\.jsonl:1: text: found a list of 1, expected text"),
    ("d.jsonl", '{"messages": []}\n', r"d\.jsonl:1: messages: found an empty list, expected a list of messages"),
    ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', r"d\.jsonl:1: the last message is from user, expected assistant"),
    ("d.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', r"d\.jsonl:1: found no message from user"),
    ("d.jsonl", '{"prompt": [{"role": "assistant", "content": "a"}], "answer": "b"}\n', r"d\.jsonl:1: found no message from user"),
    ("d.jsonl", '{"prompt": "a"}\n', r"d\.jsonl:1: found a prompt alone, expected one with completion, or with answer, tests, extra"),
    ("d.jsonl", '{"prompt": "a", "extra": {}}\n', r"d\.jsonl:1: found a prompt alone"),
    ("d.jsonl", '{"prompt": "a", "answer": "b", "extra": 3}\n', r"d\.jsonl:1: extra: found int 3, expected an object"),
    (
        "d.jsonl",
        '{"prompt": "a", "extra": {"id": 3}}\n',
        r"d\.jsonl:1: extra: found id, expected names other than prompts, completions, id,",
    ),
    ("d.jsonl", '{"prompt": "a", "tests": NaN}\n', r"d\.jsonl:1: extra, tests: found a value that JSON cannot hold \(Out of range float"),
    ("d.jsonl", '{"prompt": "a", "tests": "\\ud800"}\n', r"d\.jsonl:1: extra, tests: found half a surrogate pair \('\\ud800'\)"),
    (
        "d.jsonl",
        '{"messages": [{"role": "narrator", "content": "a"}]}\n',
        r"d\.jsonl:1: messages\[0\]\.role: found 'narrator', expected system, user,",
    ),
    ("d.jsonl", '{"messages": [{"role": "user"}]}\n', r"d\.jsonl:1: messages\[0\]\.content: found nothing, expected text"),
    ("d.jsonl", '{"messages": ["hello"]}\n', r"d\.jsonl:1: messages\[0\]: found 'hello', expected an object with role and content"),
    (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]}\n',
        r"d\.jsonl:1: found a system message at position 1, expected only the first",
    ),
    (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}\n',
        r"d\.jsonl:1: messages\[0\]\.tool_calls: found calls of user, expected only those of assistant",
    ),
    (
        "d.jsonl",
        '{"conversations": [{"from": "me", "value": "a"}]}\n',
        r"d\.jsonl:1: conversations\[0\]\.from: found 'me', expected system,",
    ),
    (
        "d.jsonl",
        '{"conversations": [{"role": "user", "content": "a"}]}\n',
        r"d\.jsonl:1: conversations\[0\]: found an object with role, con",
    ),
    (
        "d.jsonl",
        '{"instruction": "a", "output": "b", "history": [["c"]]}\n',
        r"d\.jsonl:1: history\[0\]: found a list of 1, expected \[quest",
    ),
    (
        "d.jsonl",
        '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
        r"d\.jsonl:1: found prompt as 'a', completion as",
    ),
    ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}], "tools": "["}\n', r"d\.jsonl:1: tools: found text that is no JSON"),
    ("d.json", '[\n{"text": "a"},\n{"text":\n[]}]', r"d\.json:3: text: found an empty list, expected text"),
    ("d.json", '[\n{"text": "a"},\n{"text" 1}]', r"d\.json:3: found no JSON \(Expecting ':'"),
    ("d.json", '[{"text": "a"}\n{"text": "b"}]', r"d\.json:2: found no JSON \(Expecting ',' or '\]'"),
    ("d.json", '[{"text": "a"}', r"d\.json:1: found no JSON"),
    ("d.json", '{"text": "a"}\n', r"d\.json:1: found no list, expected a list of objects"),
    ("d.csv", "prompt,completion\na,b\n\nc\n", r"d\.csv:4: found 1 cells, expected 2, as in the header"),
    ("d.csv", 'prompt,completion\n"a\nb",c\nd,\n', r"d\.csv:4: found no completion \(columns: prompt\)"),
    ("d.csv", 'prompt,completion\na,"b" c\n', r"d\.csv:2: found no CSV"),
    ("d.csv", "", r"d\.csv:1: found no header"),
    ("d.csv", "prompt;completion\na;b\n", r"d\.csv:1: found one column, 'prompt;completion', expected columns separated by commas"),
    ("d.json", '[{"text": "a"}, {"prompt": 3}]', r"d\.json:1 \(row 2\): found "),
    ("d.csv", "prompt,prompt,completion\na,b,c\n", r"d\.csv:1: found the column prompt twice, expected once"),
    ("d.parquet", "no parquet", r"d\.parquet: found no parquet"),
    ("d.jsonl", "\n", r"the train split is empty: 0 rows in 0 groups are left"),
    (
        "d.json",
        '[{"text": "a"}]\n[{"text": "b"}]',
        r"d\.json:2: found '\[\{\"text\": \"b\"\}\]' after the end of the list, expected one list",
    ),
    ("d.json", '[{"text": "a"}],\n\n{"text": "b"}\n', r"d\.json:1: found ',"),
    ("d.json", '[\n{"text": "a"},\n{"id": ' + 5000 * "9" + "}]", r"d\.json:3: found no JSON \(Exceeds the limit"),
    ("d.json", '[{"text": "a"},\n' + 5000 * "[" + 5000 * "]" + "]", r"d\.json:2: found no JSON \(maximum recursion"),
    ("d.json", '[{"text": "a", "text": "b"}]', r"d\.json:1: found no JSON \(the key 'text' is twice in one object"),
    (
        "d.jsonl",
        GOOD + '{"prompt": "a", "completion": "b", "completion": "c"}\n',
        r"d\.jsonl:2: found no JSON \(the key 'completion' is twice",
    ),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": "b", "n": ' + 5000 * "9" + "}\n", r"d\.jsonl:2: found no JSON \(Exceeds the limit"),
    (
        "d.jsonl",
        GOOD + '{"prompt": "a", "completion": "b", "\\udc00": 1}\n',
        r"d\.jsonl:2: column '.*\\udc00': found half a surrogate pair",
    ),
    ("d.jsonl", GOOD + '{"prompt": "a", "completion": "b", "system": "c"}\n', r"d\.jsonl:2: found system beside a prompt that is text"),
    ("d.jsonl", GOOD + '{"prompt": "[{\'role\': \'user\'}]", "completion": "b"}\n', r"d\.jsonl:2: prompt: found text that is no JSON"),
    ("d.jsonl", '{"prompt": "a", "answer": Infinity}\n', r"d\.jsonl:1: answer: found inf, expected text or a number"),
    ("d.jsonl", '{"prompt": "a", "answer": false}\n', r"d\.jsonl:1: answer: found bool False, expected text"),
    (
        "d.jsonl",
        '{"system": "b", "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]}\n',
        r"d\.jsonl:1: found a system prompt in the column system and another one in the conversation",
    ),
    (
        "d.jsonl",
        asked('"content": [{"type": "image_url", "image_url": "x"}]'),
        r"messages\[1\]\.content\[0\]: found image_url, expected parts",
    ),
    ("d.jsonl", asked('"content": "b", "weight": 0.5'), r"messages\[1\]\.weight: found float 0\.5, expected 0 \(not trained on\) or 1"),
    ("d.jsonl", asked('"content": "b", "loss": false'), r"d\.jsonl:1: every answer has weight 0"),
    ("d.jsonl", asked('"content": "b", "tool_calls": 5'), r"messages\[1\]\.tool_calls: found int 5, expected a list of calls"),
    ("d.jsonl", asked('"tool_calls": "7"'), r"messages\[1\]\.tool_calls: found int 7, expected a list of calls"),
    (
        "d.jsonl",
        asked('"tool_calls": ["f", "g"]'),
        r"messages\[1\]\.tool_calls\[0\]: found 'f', expected an object with name and arguments",
    ),
    (
        "d.jsonl",
        asked('"tool_calls": {"name": "f", "arguments": {}}'),
        r"tool_calls: found an object with name, arguments, expected a list of calls",
    ),
    ("d.jsonl", asked('"tool_calls": [{"function": "f"}]'), r"tool_calls\[0\]: found 'f', expected an object with name and arguments"),
    ("d.jsonl", asked('"tool_calls": [{"arguments": {}}]'), r"tool_calls\[0\]\.name: found nothing, expected text"),
    (
        "d.jsonl",
        asked('"tool_calls": [{"name": "f", "arguments": [1]}]'),
        r"tool_calls\[0\]\.arguments: found a list of 1, expected an object",
    ),
    ("d.jsonl", asked('"tool_calls": [{"name": "f", "arguments": "{1"}]'), r"tool_calls\[0\]\.arguments: found text that is no JSON"),
    (
        "d.jsonl",
        asked('"tool_calls": [{"name": "f", "parameters": {"a": 1}}]'),
        r"tool_calls\[0\]: found no arguments \(fields: name, parameters\)",
    ),
    (
        "d.jsonl",
        asked('"tool_calls": [{"name": "f", "arguments": {"a": "\\ud800"}}]'),
        r"messages\[1\]\.tool_calls: found half a surrogate pair",
    ),
    (
        "d.jsonl",
        asked('"tool_calls": [{"name": "f", "arguments": {"\\udfff": 1}}]'),
        r"messages\[1\]\.tool_calls: found half a surrogate pair",
    ),
    (
        "d.jsonl",
        asked('"tool_calls": [{"name": "f", "arguments": {"a": NaN}}]'),
        r"messages\[1\]\.tool_calls: found a value that JSON cannot hold",
    ),
    ("d.jsonl", asked('"content": "b"', '"tools": [{"name": "\\ud800"}]'), r"d\.jsonl:1: tools: found half a surrogate pair"),
    ("d.jsonl", asked('"content": "b"', '"tools": ["search"]'), r"d\.jsonl:1: tools\[0\]: found text that is no JSON"),
    ("d.jsonl", asked('"content": "b"', '"tools": 3'), r"d\.jsonl:1: tools: found int 3, expected a list of JSON schemas"),
    ("d.jsonl", asked('"content": "b"', '"tools": "' + 5000 * "[" + '"'), r"d\.jsonl:1: tools: found text that is no JSON"),
    (
        "d.jsonl",
        asked('"content": "b"', '"extra": {"a": ' + 900 * "[" + 900 * "]" + "}"),
        r"d\.jsonl:1: (extra|found lists and objects nested too)",
    ),
    ("d.jsonl", '{"messages": [{"from": "human", "value": "a"}]}\n', r"d\.jsonl:1: messages\[0\]\.role: found nothing, expected system"),
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
    with pytest.raises(StageFailed, match=r"d\.jsonl: found UTF-16, expected UTF-8"):
        build(tmp_path, [{"type": "files", "path": "d.jsonl", "on_bad_row": on_bad_row}])
    (tmp_path / "d.jsonl").write_text(text.removeprefix(mark), encoding="utf-8-sig")
    assert next(row.text for row in build(tmp_path, [{"type": "files", "path": "d.jsonl"}]).rows()) == "ł0 → ok"


def test_bad_bytes_and_parquet_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(StageFailed, match=r"d\.csv:2: found bytes that are not UTF-8"):
        build(tmp_path, [{"type": "files", "path": "d.csv"}])
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(StageFailed, match=r"d\.jsonl:2: found bytes that are not UTF-8 \('utf-8' codec can't decode"):
        build(tmp_path, [{"type": "files", "path": "d.jsonl"}])
    write_file(tmp_path / "d.parquet", [{"text": "a"}, {"text": " "}])
    with pytest.raises(StageFailed, match=r"d\.parquet: row 2: text: found empty text"):
        build(tmp_path, [{"type": "files", "path": "d.parquet"}])


SENTENCES = [
    ("cp1252", "Où est le café ? là, {}"),
    ("cp1252", "Wo ist die Straße? “über” – {} €"),
    ("cp1250", "Gdzie jest książka? Zażółć gęślą jaźń {}"),
    ("cp1251", "Где находится музей? Там {}"),
    ("cp932", "東京はどこですか {}"),
    ("gb18030", "北京在哪里？那里 {}"),
]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json", "jsonl.gz"])
@pytest.mark.parametrize(("encoding", "sentence"), SENTENCES, ids=[encoding for encoding, _ in SENTENCES])
def test_the_hint_names_the_encoding_that_fits(tmp_path: Path, encoding: str, sentence: str, ending: str) -> None:
    plain, *rest = [
        json.dumps({"prompt": text, "completion": "b"}, ensure_ascii=False) for text in ("a", *(sentence.format(i) for i in range(20)))
    ]
    text = {"csv": "prompt\n" + "\n".join([plain, *rest]).replace('"', ""), "json": "[" + ",\n".join([plain, *rest]) + "]"}.get(
        ending, "\n".join([plain, *rest])
    )
    content = text.encode(encoding)
    (tmp_path / f"d.{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(StageFailed, match=rf"d\.{ending}:{3 if ending == 'csv' else 2}: found bytes that are not UTF-8") as failure:
        list(raised(file_records(tmp_path / f"d.{ending}")))
    assert f"it reads as {encoding} (`iconv -f {encoding} -t utf-8`)" in failure.value.hint


def raised(records: Records) -> Iterator[Any]:
    for place, record in records:
        if isinstance(record, BadRow):
            raise StageFailed("data", f"{place}: {record.message}", record.hint)
        yield record


def test_columnar_files_name_what_cannot_be_read(tmp_path: Path) -> None:
    lengths, letters = np.array([0, 1, 2, 3], np.int32), b"a\xffb"
    broken = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(lengths), pa.py_buffer(letters)])
    pq.write_table(pa.table({"text": broken}), tmp_path / "d.parquet")
    found = list(file_records(tmp_path / "d.parquet"))
    assert [record for _, record in found if isinstance(record, dict)] == [{"text": "a"}, {"text": "b"}]
    assert found[1][0].endswith("d.parquet: row 2")
    assert "found a value that cannot be read ('utf-8' codec" in found[1][1].message
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "e.parquet")
    with pytest.raises(StageFailed, match=r"e\.parquet: found the column text twice"):
        list(file_records(tmp_path / "e.parquet"))
    calls = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"day": datetime.date(2024, 1, 1)}}]}]
    write_file(tmp_path / "f.parquet", [{"messages": [{"role": "user", "content": "a"}, *calls]}])
    with pytest.raises(StageFailed, match=r"f\.parquet: row 1: messages\[1\]\.tool_calls: found a value that JSON cannot hold"):
        build(tmp_path, [{"type": "files", "path": "f.parquet"}])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=[]), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from([*ROLES, "bot"]),
            "content": st.sampled_from(["a", "", None, [{"type": "text", "text": "a"}]]) | json_values,
        },
        optional=dict.fromkeys(("tool_calls", "function_call", "name", "weight", "reasoning_content"), json_values),
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(
    record=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(sorted(KNOWN), json_values),
            "messages": messages,
            "prompt": messages | st.just("a"),
            "system": st.text(),
        },
    )
)
def test_a_record_is_read_whole_or_refused(record: dict[str, Any]) -> None:
    """Whatever JSON holds: a row that can be stored, or a BadRow that can be printed, and nothing else is raised."""
    ignored: Counter[str] = Counter()
    try:
        record = DECODER.decode(json.dumps(record))
        readable(record)
        given = {name: value for name, value in record.items() if value is not None}
        row = identified(to_row(given, detect(given), "sources.0", ignored))
    except BadRow as error:
        error.message.encode()  # raises where it cannot be printed
        return
    assert json.dumps([row.messages, row.extra, row.answer], allow_nan=False, ensure_ascii=False).encode()


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
    assert "data.jsonl.gz: found no complete gzip file" in refused("data.jsonl.gz", packed[:-20])
    assert "data.jsonl.gz: found no complete gzip file" in refused("data.jsonl.gz", packed[:20] + b"nothing" + packed[27:])
    assert "data.jsonl.gz: found no complete gzip file" in refused("data.jsonl.gz", GOOD.encode())
    assert "found columns prompt, completion, but sources.0.columns names qestion" in refused(
        "c.jsonl", GOOD.encode(), columns={"prompt": "qestion"}
    )
    emptied = "the train split is empty: 0 rows in 0 groups are left of 2 that were read (2 could not be read)"
    assert refused("d.jsonl", b"no\nno\n") == emptied


@pytest.mark.parametrize(
    ("source", "failure_class", "message"),
    [
        ({"columns": {"question": "prompt"}}, "config", r"sources\.0\.columns: found question, expected answer, "),
        (
            {"columns": {"prompt": "qestion"}},
            "data",
            r"data\.jsonl:1: found columns prompt, completion, but sources\.0\.columns names qestion",
        ),
        ({"path": "*.none"}, "data", r"sources\.0\.path: no file matches \*\.none"),
        (
            {"path": "data.txt"},
            "config",
            r"data\.txt: found ending \.txt, expected \.jsonl, \.json, \.csv \(each also with \.gz\), \.parquet",
        ),
    ],
)
def test_bad_sources(tmp_path: Path, source: dict[str, Any], failure_class: str, message: str) -> None:
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(StageFailed, match=message) as failure:
        build_rows(tmp_path, sums(3), source)
    assert failure.value.failure_class == failure_class
