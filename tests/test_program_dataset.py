"""Program `dataset`: sources, formats, what is refused, lengths, splits, report. Needs the torch runtime."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import save_pico
from program_tools import make_request, payload_digest, run_process, run_program

from tasks.dataset import bucket, identified, split
from tasks.masks import prompt_ids, token_counts, tokenize
from tasks.rows import SPLITS, Row, content_hash, read_split
from tasks.sources import Item
from tuneline.errors import StageFailed
from tuneline.protocol import Input, Request, Result
from tuneline.spec import Split

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALL_TRAIN = {"test": 0.0}


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Input:
    return Input(path=save_pico(tmp_path_factory.mktemp("pico") / "model"), digest="0" * 64, type="Model")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from pico import tokenizer

    return tokenizer()


@dataclass
class Build:
    """A stage built, and what came of it."""

    request: Request
    result: Result
    events: list[dict[str, Any]]

    def rows(self, name: str = "train") -> list[Row]:
        return read_split(self.request.payload, name)

    def every(self) -> list[Row]:
        return [row for name in SPLITS for row in self.rows(name)]

    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events if event["type"] == "warning"]

    def report(self) -> str:
        return (self.request.meta / "report.md").read_text(encoding="utf-8")


def build(folder: Path, sources: list[dict[str, Any]], model: Input | None = None, **stage: Any) -> Build:
    """Files of a source are those that its `path` matches in `folder`, as the orchestrator finds them."""
    files = {f"sources.{i}.path": sorted(folder.glob(source["path"])) for i, source in enumerate(sources) if source["type"] == "files"}
    commits = {f"sources.{i}.repo": COMMIT for i, source in enumerate(sources) if source["type"] == "hub"}
    config = {"kind": "dataset", "sources": sources, "split": ALL_TRAIN} | ({"model": "base"} if model else {}) | stage
    inputs = {"model": model} if model else {}
    run = folder / f"run-{len(list(folder.glob('run-*')))}"
    request = make_request(run, config, inputs, files=files, commits=commits)
    return Build(request, *run_program(request))


def build_rows(folder: Path, records: list[Any], source: dict[str, Any] | None = None, **stage: Any) -> Build:
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return build(folder, [{"type": "files", "path": "data.jsonl"} | (source or {})], **stage)


def sums(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + {i}?", "completion": str(2 * i)} for i in range(start, start + count)]


# --- formats ----------------------------------------------------------------------------------------------------------

USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": content} for role, content in (("user", "2 + 2?"), ("assistant", "4"), ("system", "Be brief."))
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": (SYSTEM, USER, ASSISTANT)}),
        ("messages", {"messages": [USER, ASSISTANT], "answer": 4}, {"messages": (USER, ASSISTANT), "answer": "4"}),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ASSISTANT], "tools": [TOOL]},
            {
                "messages": (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ASSISTANT),
                "extra": {"tools": [TOOL]},
            },
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
            {"messages": (SYSTEM, USER, ASSISTANT)},
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            {"messages": (SYSTEM, USER, ASSISTANT)},
        ),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4"}, {"messages": (USER, ASSISTANT)}),
        (
            "alpaca",
            {"instruction": "Add.", "input": "3, 3", "output": "6", "system": "Be brief.", "history": [["2 + 2?", "4"]]},
            {"messages": (SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Add.\n3, 3"}, {"role": "assistant", "content": "6"})},
        ),
        ("prompt_completion", {"prompt": "2 + 2 = ", "completion": "4"}, {"prompt": "2 + 2 = ", "completion": "4"}),
        ("prompt_completion", {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, {"messages": (SYSTEM, USER, ASSISTANT)}),
        ("text", {"text": "def f():\n    return 4\n"}, {"text": "def f():\n    return 4\n"}),
        ("prompt", {"prompt": "2 + 2 = ", "answer": 4}, {"prompt": "2 + 2 = ", "answer": "4"}),
        ("prompt", {"prompt": [SYSTEM, USER], "tests": "assert True"}, {"messages": (SYSTEM, USER), "extra": {"tests": "assert True"}}),
        ("prompt", {"prompt": "2 + 2 = ", "extra": '{"level": 1}'}, {"prompt": "2 + 2 = ", "extra": {"level": 1}}),
        ("messages", {"messages": [USER, ASSISTANT, USER], "answer": "4"}, {"messages": (USER, ASSISTANT, USER), "answer": "4"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "2 + 2?"}], "answer": "4"}, {"messages": (USER,), "answer": "4"}),
        (
            "messages",
            {"messages": [USER, ASSISTANT], "tools": [TOOL], "extra": {"level": 1}, "tests": ["assert True"]},
            {"messages": (USER, ASSISTANT), "extra": {"level": 1, "tests": ["assert True"], "tools": [TOOL]}},
        ),
        (
            "prompt_completion",
            {"prompt": "2 + 2 = ", "completion": "4", "tests": ["assert True"]},
            {"prompt": "2 + 2 = ", "completion": "4", "extra": {"tests": ["assert True"]}},
        ),
    ],
)
def test_formats(tmp_path: Path, name: str, record: dict[str, Any], expected: dict[str, Any]) -> None:
    for row_format in ("auto", name):
        (row,) = build_rows(tmp_path, [record], {"format": row_format}).rows()
        assert replace(row, id="", group="") == Row("sources.0", **expected)
        assert row.id == content_hash(row.content())


def write_file(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as content:
            writer = csv.DictWriter(content, records[0])
            writer.writeheader()
            writer.writerows(records)


# Surrogates are refused, NUL and a lone return do not survive CSV.
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00\r"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_every_file_type_and_format_gives_the_same_rows(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    rows = []
    for suffix in ("json", "jsonl", "csv", "parquet"):
        file = tmp_path / f"data.{suffix}"
        write_file(file, [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
        for packed in (False, True) if suffix != "parquet" else (False,):
            if packed:
                (file := tmp_path / f"data.{suffix}.gz").write_bytes(gzip.compress((tmp_path / f"data.{suffix}").read_bytes()))
            rows.append([(row.prompt, row.completion) for row in build(tmp_path, [{"type": "files", "path": file.name}]).every()])
    assert len(rows) == 7
    assert all(other == rows[0] for other in rows)
    assert set(rows[0]) <= set(pairs)

    conversations: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": prompt, "output": completion} for prompt, completion in pairs],
        "messages": [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in pairs],
        "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]} for p, c in pairs],
    }
    ids = []
    for name, records in conversations.items():
        for suffix in ("jsonl", "parquet"):
            write_file(tmp_path / f"{name}.{suffix}", records)
            ids.append([(row.id, row.group) for row in build(tmp_path, [{"type": "files", "path": f"{name}.{suffix}"}]).every()])
    assert all(other == ids[0] for other in ids)


def test_columns_are_renamed(tmp_path: Path) -> None:
    record = {"question": "2 + 2?", "answer": "4", "prompt": "not this one", "level": 3}
    run = build_rows(tmp_path, [record], {"columns": {"prompt": "question", "completion": "answer"}})
    assert [(row.prompt, row.completion, row.answer) for row in run.rows()] == [("2 + 2?", "4", None)]
    assert "Not read: level (1)." in run.report()


def test_several_files_are_read_in_sorted_order(tmp_path: Path) -> None:
    write_file(tmp_path / "b.csv", [{"text": "second"}])
    write_file(tmp_path / "a.jsonl", [{"text": "first"}])
    assert [row.text for row in build(tmp_path, [{"type": "files", "path": "*.*"}]).rows()] == ["first", "second"]


def test_system_prompt(tmp_path: Path) -> None:
    other = {"role": "system", "content": "Be kind."}
    run = build_rows(tmp_path, [{"messages": [USER, ASSISTANT]}, {"messages": [other, USER, ASSISTANT]}], system="Be brief.")
    assert [row.messages[0]["content"] for row in run.rows() if row.messages] == ["Be brief.", "Be kind."]
    assert len({row.group for row in run.rows()}) == 1
    run = build_rows(tmp_path, [{"text": "plain"}], system="Be brief.")
    assert run.warnings() == ["the system prompt is for conversations: 1 rows of another format go without"]


# --- what is refused --------------------------------------------------------------------------------------------------

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


# --- duplicates and splits --------------------------------------------------------------------------------------------


def test_duplicates_are_dropped_across_sources_and_counted(tmp_path: Path) -> None:
    write_file(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two  \n"}, {"text": "one"}])
    write_file(tmp_path / "b.jsonl", [{"text": "two"}, {"text": "three"}])
    run = build(tmp_path, [{"type": "files", "path": "a.jsonl"}, {"type": "files", "path": "b.jsonl"}])
    assert [(row.text, row.source) for row in run.rows()] == [("one", "sources.0"), ("two  \n", "sources.0"), ("three", "sources.1")]
    metrics = run.result.metrics
    assert (metrics["rows_read"], metrics["duplicates"], metrics["rows_train"], metrics["groups"]) == (5, 2, 3, 3)
    assert "| a.jsonl | 3 | 0 | 0 | 1 | 2 | 0 | 0 | 0 |" in run.report()
    assert "| b.jsonl | 2 | 0 | 0 | 1 | 1 | 0 | 0 | 0 |" in run.report()
    document = json.loads((run.request.meta / "report.json").read_text())
    first, second = ({"source": name, "read": read, "fates": {"duplicates": 1}} for name, read in (("a.jsonl", 3), ("b.jsonl", 2)))
    splits = [{"train": rows, "validation": 0, "test": 0} for rows in (2, 1)]
    assert document == {
        "sources": [first | {"splits": splits[0]}, second | {"splits": splits[1]}],
        "lengths": [],
        "ignored": {},
        "left_out": {},
    }


def test_rows_with_one_prompt_stay_together(tmp_path: Path) -> None:
    records = [{"prompt": f"{i % 40}?", "completion": str(i)} for i in range(200)]
    run = build_rows(tmp_path, records, split={"validation": 0.2, "test": 0.2})
    groups = {name: {row.group for row in run.rows(name)} for name in SPLITS}
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 40
    assert run.result.metrics["rows_train"] + run.result.metrics["rows_validation"] + run.result.metrics["rows_test"] == 200
    assert any("40 prompts have differing answers, the first at " in warning for warning in run.warnings())
    assert [int(row.completion or "") for row in run.rows()] == sorted(int(row.completion or "") for row in run.rows())


prompts = st.lists(st.integers(0, 50), max_size=40)


def items_of(numbers: list[int]) -> list[Item]:
    return [Item(f"row {i}", identified(Row("sources.0", prompt=f"{number}?", completion=str(i)))) for i, number in enumerate(numbers)]


@given(before=prompts, more=prompts, seed=st.integers(0, 2**31 - 1), validation=st.floats(0, 0.49), test=st.floats(0, 0.49))
def test_more_rows_never_move_a_group(before: list[int], more: list[int], seed: int, validation: float, test: float) -> None:
    shares = Split(validation=validation, test=test)

    def homes(numbers: list[int]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, items in split(items_of(numbers), shares, seed).items():
            for item in items:
                assert found.setdefault(item.row.group, name) == name
        return found

    few, many = homes(before), homes(before + more)
    assert few.items() <= many.items()
    assert homes(more[::-1] + before) == many


@given(seed=st.integers(0, 2**31 - 1), share=st.floats(0, 0.5), larger=st.floats(0, 0.4))
def test_a_larger_test_share_keeps_every_test_group(seed: int, share: float, larger: float) -> None:
    items = items_of(list(range(50)))
    few = {item.row.group for item in split(items, Split(test=share), seed)["test"]}
    assert few <= {item.row.group for item in split(items, Split(test=share + larger), seed)["test"]}


def test_buckets_are_even_and_differ_by_seed() -> None:
    places = [bucket(0, content_hash(i)) for i in range(4000)]
    assert all(0 <= place < 1 for place in places)
    assert all(abs(sum(place < share for place in places) / 4000 - share) < 0.03 for share in (0.1, 0.25, 0.5, 0.9))
    assert bucket(1, content_hash(0)) != places[0]


@pytest.mark.parametrize(
    ("records", "shares", "message"),
    [
        (sums(3), {"test": 0.001}, r"the test split is empty: 3 rows in 3 groups are left"),
        (sums(3), {"test": 0.0, "validation": 0.001}, r"the validation split is empty"),
        (sums(3), {"test": 0.999}, r"the train split is empty"),
    ],
)
def test_an_empty_split_is_refused(tmp_path: Path, records: list[Any], shares: dict[str, float], message: str) -> None:
    with pytest.raises(StageFailed, match=message) as failure:
        build_rows(tmp_path, records, split=shares)
    assert failure.value.failure_class == "data"
    assert failure.value.hint


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_token_counts_are_those_of_the_training(tokenizer: Any) -> None:
    rows = [
        Row("s", messages=(SYSTEM, USER, ASSISTANT, USER, ASSISTANT)),
        Row("s", text="plain text, 12345"),
        Row("s", prompt="2 + 2 = ", completion="4"),
        Row("s", messages=(USER, ASSISTANT)),
        Row("s", text="ends by itself<|im_end|>"),
        Row("s", prompt="2 + 2 = ", answer="4"),
        Row("s", messages=(USER, ASSISTANT, USER), answer="4"),
    ]
    assert token_counts(rows, tokenizer) == [len(tokenize(row, tokenizer).input_ids) for row in rows]
    assert token_counts([], tokenizer) == []


def test_prompts_without_completions_are_asked_whole_and_never_trained_on(tmp_path: Path, pico: Input, tokenizer: Any) -> None:
    records = [{"messages": [USER, ASSISTANT, {"role": "user", "content": "3 + 3?"}], "answer": "6"}, {"prompt": "2 + 2 = ", "answer": "4"}]
    for i, record in enumerate(records):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    run = build(tmp_path, [{"type": "files", "path": f"{i}.jsonl"} for i in range(2)], pico)
    conversation, plain = run.rows()
    assert conversation.messages is not None
    assert conversation.prompt_messages() == conversation.messages
    assert [row.reference() for row in run.rows()] == ["6", "4"]
    assert "3 + 3?" in tokenizer.decode(prompt_ids(conversation, tokenizer))
    assert prompt_ids(plain, tokenizer) == tokenizer("2 + 2 = ")["input_ids"] == tokenize(plain, tokenizer).input_ids
    assert not any(tokenize(plain, tokenizer).trained)
    assert "2 + 2 = " in run.report()


def test_over_long_rows_are_dropped_and_counted(tmp_path: Path, pico: Input, tokenizer: Any) -> None:
    records = [{"messages": [USER, {"role": "assistant", "content": "word " * count}]} for count in (1, 100, 2, 200)]
    run = build_rows(tmp_path, records, model=pico, max_length=60)
    assert [len(str(row.messages[-1]["content"]).split()) for row in run.rows() if row.messages] == [1, 2]
    counts = token_counts(run.rows(), tokenizer)
    metrics = run.result.metrics
    assert (metrics["rows_read"], metrics["over_long"], metrics["rows_train"]) == (4, 2, 2)
    assert (metrics["tokens_train"], metrics["tokens_max"], metrics["tokens_p50"]) == (sum(counts), max(counts), min(counts))
    assert "| data.jsonl | 4 | 0 | 2 | 0 | 2 | 0 | 0 | 0 |" in run.report()
    lengths = json.loads((run.request.meta / "report.json").read_text())["lengths"]
    assert sum(rows for _, _, rows in lengths) == 2
    assert all(any(least <= count <= most for least, most, _ in lengths) for count in counts)
    assert (run.request.meta / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_truncated(tmp_path: Path, pico: Input, tokenizer: Any) -> None:
    long = "größer 漢字 🙂 " * 30
    run = build_rows(
        tmp_path, [{"text": "short"}, {"text": long}, {"text": long + "and another end"}], model=pico, max_length=40, over_long="truncate"
    )
    short, cut = run.rows()
    assert short.text == "short"
    assert cut.text
    assert long.startswith(cut.text)
    assert cut.id == content_hash(cut.content())
    assert 36 <= len(tokenize(cut, tokenizer).input_ids) <= 40
    # What is the same once it is cut is a duplicate.
    assert (run.result.metrics["truncated"], run.result.metrics["duplicates"]) == (2, 1)


@pytest.mark.parametrize(
    ("over_long", "message"),
    [
        ("truncate", r"data\.jsonl:2: found a row of \d+ tokens, allowed 60: only plain text can be truncated"),
        ("error", r"data\.jsonl:2: found a row of \d+ tokens, allowed 60\n"),
    ],
)
def test_over_long_conversations_are_refused(tmp_path: Path, pico: Input, over_long: str, message: str) -> None:
    records = [{"messages": [USER, {"role": "assistant", "content": "word " * count}]} for count in (1, 100)]
    with pytest.raises(StageFailed, match=message) as failure:
        build_rows(tmp_path, records, model=pico, max_length=60, over_long=over_long)
    assert "over_long: drop" in failure.value.hint


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, pico: Input) -> None:
    model = Path(shutil.copytree(pico.path, tmp_path / "model"))
    refusal = "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    (model / "chat_template.jinja").write_text("{% for message in messages %}" + refusal + "{{ message.content }}{% endfor %}")
    records = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, {"role": "tool", "content": "4"}, ASSISTANT]}]
    with pytest.raises(StageFailed, match=r"data\.jsonl:2: the chat template refuses row \w+: no tools here"):
        build_rows(tmp_path, records, model=pico.model_copy(update={"path": model}))


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_shows_what_is_trained_on(tmp_path: Path, pico: Input) -> None:
    records = [{"messages": [USER, {"role": "assistant", "content": f"It is {i}.\n```\n{i}\n```"}]} for i in range(9)]
    run = build_rows(tmp_path, records, model=pico)
    samples = [event for event in run.events if event["type"] == "sample"]
    assert [sample["data"]["id"] for sample in samples] == [run.rows()[i].id for i in (0, 4, 8)]
    assert samples[0]["message"].endswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦It is 0.\n```\n0\n```<|im_end|>\n⟧")
    assert all(f"````text\n{sample['message']}\n````" in run.report() for sample in samples)
    assert "p50 " in run.report()
    assert "####" in run.report()
    steps = [event["step"] for event in run.events if event["type"] == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 4


def test_warnings(tmp_path: Path) -> None:
    assert build_rows(tmp_path, [{"prompt": str(i), "completion": "yes"} for i in range(3)]).warnings() == [
        "all 3 rows have the same answer: 'yes'"
    ]
    run = build_rows(tmp_path, [{"text": "a"}] * 3 + [{"text": "b"}])
    assert run.warnings() == []
    run = build_rows(tmp_path, [{"text": "a"}] * 4)
    assert run.warnings() == ["more than half of the rows were dropped (duplicates): 3 of 4"]
    run = build_rows(tmp_path, [{"messages": [USER | {"weight": 1}, ASSISTANT]}])
    assert run.warnings() == ["parts of messages are not read: messages.weight"]


def test_a_split_of_few_rows_is_warned_of(tmp_path: Path) -> None:
    run = build_rows(tmp_path, sums(40), split={"test": 0.1, "validation": 0.5})
    assert 0 < len(run.rows("test")) < 10 <= len(run.rows("validation"))
    assert run.warnings() == [
        f"the test split has {len(run.rows('test'))} of 40 rows: figures of so few say little; add rows, or raise split.test"
    ]


# --- generator and hub ------------------------------------------------------------------------------------------------

GYM = {"type": "reasoning_gym", "task": "chain_sum", "size": 60, "config": {"max_terms": 3, "max_digits": 1}}


def test_reasoning_gym_rows_can_be_scored(tmp_path: Path) -> None:
    from reasoning_gym import get_score_answer_fn

    run = build(tmp_path, [GYM, GYM | {"size": 5}], split={"test": 0.2})
    rows = run.every()
    assert run.result.metrics["rows_read"] == 65
    assert {row.source for row in rows} == {"sources.0", "sources.1"}
    for row in rows:
        assert row.messages is not None
        scorer = row.extra["scorer"]
        assert row.messages == ({"role": "user", "content": scorer["entry"]["question"]}, {"role": "assistant", "content": row.answer})
        assert get_score_answer_fn(scorer["dataset"])(answer=row.answer, entry=scorer["entry"]) == 1.0


def test_more_generated_rows_begin_with_the_same_ones(tmp_path: Path) -> None:
    few, many = (build(tmp_path, [GYM | {"size": size}], split={"test": 0.2}) for size in (40, 80))
    for name in SPLITS:
        ids = [row.id for row in many.rows(name)]
        assert [row.id for row in few.rows(name)] == ids[: len(few.rows(name))]
    assert [row.id for row in build(tmp_path, [GYM], seed=1).every()] != [row.id for row in build(tmp_path, [GYM]).every()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chain_sums"}, r"sources\.0\.task: found chain_sums, allowed"),
        ({"config": {"terms": 3}}, r"sources\.0\.config: chain_sum: .*terms"),
        ({"config": {"min_terms": 0}}, r"sources\.0\.config: chain_sum: min_terms must be positive"),
        ({"task": "graph_color", "config": {}}, r"graph_color gives no answer to learn from"),
        ({"task": "rearc", "config": {}}, r"rearc cannot be scored once its rows are written"),
    ],
)
def test_bad_generators(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StageFailed, match=message) as failure:
        build(tmp_path, [GYM | changes])
    assert failure.value.failure_class == "config"


def test_hub_dataset_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder below the current one for a repository of that name."""
    folder = tmp_path / "tests" / "sums"
    folder.mkdir(parents=True)
    write_file(folder / "train.parquet", [{"question": f"{i}?", "reply": str(i)} for i in range(5)])
    write_file(folder / "test.parquet", [{"question": "other?", "reply": "0"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = {"type": "hub", "repo": "tests/sums", "columns": {"prompt": "question", "completion": "reply"}}
    run = build(tmp_path, [source])
    assert [(row.prompt, row.completion) for row in run.rows()] == [(f"{i}?", str(i)) for i in range(5)]
    assert "| tests/sums | 5 |" in run.report()
    assert [row.prompt for row in build(tmp_path, [source | {"split": "test"}]).rows()] == ["other?"]
    with pytest.raises(StageFailed, match=r"sources\.0: tests/sums: Unknown split") as failure:
        build(tmp_path, [source | {"split": "dev"}])
    assert failure.value.failure_class == "data"


# --- determinism ------------------------------------------------------------------------------------------------------


def test_same_bytes_in_another_folder_process_and_hash_seed(tmp_path: Path, pico: Input) -> None:
    requests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write_file(
            folder / f"{name}.jsonl", [{"messages": [USER, {"role": "assistant", "content": str(i)}], "tools": [TOOL]} for i in range(9)]
        )
        config = {"kind": "dataset", "model": "base", "sources": [GYM, {"type": "files", "path": "*.jsonl"}], "split": {"test": 0.3}}
        files = {"sources.1.path": [folder / f"{name}.jsonl"]}
        requests.append(make_request(folder / "run", config, {"model": pico}, files=files))
    run_program(requests[0])
    done = run_process(requests[1])
    assert done.returncode == 0, done.stderr
    assert payload_digest(requests[0]) == payload_digest(requests[1])
    assert sorted(path.name for path in requests[0].payload.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    assert b"one.jsonl" not in b"".join(path.read_bytes() for path in requests[0].payload.iterdir())
