"""Program `dataset`: every format, file type, generator and hub dataset gives the rows that it should. Needs the torch runtime."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_tools import ASSISTANT, GYM, SYSTEM, TOOL, USER, build, build_rows, write_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.rows import SPLITS, Row, content_hash
from tuneline.errors import StageFailed

# --- formats ----------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


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
        ("alpaca", {"instruction": " ", "input": "2 + 2?", "output": "4"}, {"messages": (USER, ASSISTANT)}),
        (
            "messages",
            {"messages": [USER, ASSISTANT | {"reasoning": "Two and two."}], "functions": [TOOL["function"]]},
            {"messages": (USER, ASSISTANT | {"reasoning_content": "Two and two."}), "extra": {"tools": [TOOL]}},
        ),
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


# Surrogates are refused, NUL and a lone return do not survive CSV.
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00\r"), min_size=1, max_size=20).filter(str.strip)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": None}}}]
TEXT_CALL = '{"name": "add", "arguments": {"b": 2, "a": null}}'
TURNS = [USER, ASSISTANT]
EARLIER = ({"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"})
SILENT = EARLIER[1] | {"weight": 0}
WHOLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # file, record, the row of it
    ("jsonl", {"messages": TURNS, "system": "Be brief."}, {"messages": (SYSTEM, USER, ASSISTANT)}),
    ("jsonl", {"messages": [SYSTEM, *TURNS], "system": "Be brief. "}, {"messages": (SYSTEM, USER, ASSISTANT)}),
    ("jsonl", {"messages": TURNS, "system": "", "tools": "", "history": "", "extra": " "}, {"messages": (USER, ASSISTANT)}),
    ("jsonl", {"messages": [{"role": "system", "content": ""}, *TURNS], "tools": []}, {"messages": (USER, ASSISTANT)}),
    ("jsonl", {"messages": [SYSTEM, *TURNS], "history": [["1 + 1?", "2"]]}, {"messages": (SYSTEM, *EARLIER, USER, ASSISTANT)}),
    ("jsonl", {"messages": TURNS, "history": list(EARLIER)}, {"messages": (*EARLIER, USER, ASSISTANT)}),
    ("jsonl", {"prompt": [USER], "completion": [ASSISTANT], "system": "Be brief."}, {"messages": (SYSTEM, USER, ASSISTANT)}),
    ("jsonl", {"prompt": [USER], "answer": "4", "history": '[["1 + 1?", "2"]]'}, {"messages": (*EARLIER, USER), "answer": "4"}),
    ("jsonl", {"instruction": "2 + 2?", "output": "4", "input": " ", "history": ""}, {"messages": (USER, ASSISTANT)}),
    ("csv", {"messages": json.dumps(TURNS)}, {"messages": (USER, ASSISTANT)}),
    ("parquet", {"messages": json.dumps(TURNS)}, {"messages": (USER, ASSISTANT)}),
    ("csv", {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}, {"messages": (USER, ASSISTANT)}),
    ("csv", {"prompt": "[1, 2]", "completion": "[3]"}, {"prompt": "[1, 2]", "completion": "[3]"}),
    (
        "jsonl",
        {"conversations": json.dumps([{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}])},
        {"messages": (USER, ASSISTANT)},
    ),
    (
        "jsonl",
        {"messages": [USER | {"content": [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]}, ASSISTANT]},
        {"messages": (USER, ASSISTANT)},
    ),
    ("jsonl", {"messages": [SYSTEM | {"role": "developer"}, *TURNS]}, {"messages": (SYSTEM, USER, ASSISTANT)}),
    (
        "jsonl",
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": TEXT_CALL},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ]
        },
        {"messages": (USER, {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "4"}, ASSISTANT)},
    ),
    (
        "jsonl",
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": json.loads(TEXT_CALL)},
                {"role": "function", "name": "add", "content": "4"},
                ASSISTANT,
            ]
        },
        {
            "messages": (
                USER,
                {"role": "assistant", "content": "", "tool_calls": CALLS},
                {"role": "tool", "content": "4", "name": "add"},
                ASSISTANT,
            )
        },
    ),
    (
        "jsonl",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": CALLS},
                {"role": "ipython", "tool_call_id": "c1", "content": "4"},
                ASSISTANT,
            ]
        },
        {
            "messages": (
                USER,
                {"role": "assistant", "content": "", "tool_calls": CALLS},
                {"role": "tool", "content": "4", "tool_call_id": "c1"},
                ASSISTANT,
            )
        },
    ),
    (
        "jsonl",
        {"messages": [USER, ASSISTANT | {"reasoning_content": "Two twos."}]},
        {"messages": (USER, ASSISTANT | {"reasoning_content": "Two twos."})},
    ),
    *(
        (
            "jsonl",
            {"messages": [EARLIER[0], EARLIER[1] | {name: value}, USER, ASSISTANT | {name: 1}]},
            {"messages": (EARLIER[0], SILENT, USER, ASSISTANT)},
        )
        for name, value in (("weight", 0), ("loss", False), ("train", 0.0))
    ),
    ("jsonl", {"prompt": "2 - 2 = ", "answer": 0}, {"prompt": "2 - 2 = ", "answer": "0"}),
    ("jsonl", {"prompt": "2 - 2 = ", "answer": 0.50}, {"prompt": "2 - 2 = ", "answer": "0.5"}),
    ("json", {"prompt": "2 - 2 = ", "tests": "assert 1", "answer": ""}, {"prompt": "2 - 2 = ", "extra": {"tests": "assert 1"}}),
    ("parquet", {"prompt": "6 / 2 = ", "answer": 3.0}, {"prompt": "6 / 2 = ", "answer": "3"}),
    ("parquet", {"prompt": "6 / 2 = ", "answer": 3}, {"prompt": "6 / 2 = ", "answer": "3"}),
    ("parquet", {"prompt": "7 / 2 = ", "answer": 3.5}, {"prompt": "7 / 2 = ", "answer": "3.5"}),
    ("parquet", {"prompt": "7 / 2 = ", "answer": Decimal("3.50")}, {"prompt": "7 / 2 = ", "answer": "3.50"}),
    ("parquet", {"prompt": "a", "completion": "b", "answer": float("nan")}, {"prompt": "a", "completion": "b"}),
]


def test_readers_lose_nothing(tmp_path: Path) -> None:
    for number, (ending, record, _) in enumerate(WHOLE):
        write_file(tmp_path / f"{number}.{ending}", [record])
    run = build(tmp_path, [{"type": "files", "path": f"{number}.{ending}"} for number, (ending, _, _) in enumerate(WHOLE)], dedup="none")
    for number, (row, (_, record, expected)) in enumerate(zip(run.rows(), WHOLE, strict=True)):
        assert replace(row, id="", group="") == Row(f"sources.{number}", **expected), record
    assert not any("not read" in warning for warning in run.warnings())


def test_numbers_stand_as_the_file_shows_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": 3.10}\n{"prompt": "b", "answer": 1e3}\n')
    pq.write_table(pa.table({"prompt": ["c", "d"], "answer": pa.array([0.1, 3], pa.float32())}), tmp_path / "b.parquet")
    run = build(tmp_path, [{"type": "files", "path": "*.*", "format": "prompt"}])
    assert [row.answer for row in run.rows()] == ["3.10", "1e3", "0.1", "3"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_calls_and_schemas_keep_their_order_without_filled_in_nulls(tmp_path: Path, ending: str) -> None:
    def record(name: str, arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [schema]}

    records = [
        record("wake", {"time": "7:30", "label": "run", "count": 1}, {"time": {"type": "string"}, "label": {"type": "string"}}),
        record("play", {"song": "x", "count": 2, "by": ["b", "a"]}, {"song": {"type": "string", "enum": ["x"]}}),
        record("wait", {"count": 0.5}, {"count": {"type": "number"}}),
    ]
    write_file(tmp_path / f"d.{ending}", records)
    rows = build(tmp_path, [{"type": "files", "path": f"d.{ending}"}]).rows()
    found = [{"messages": list(row.messages or ()), "tools": row.extra["tools"]} for row in rows]
    assert found == records
    if ending == "jsonl":  # a columnar file has one order for all rows
        assert json.dumps(found) == json.dumps(records)


def test_what_is_not_read_is_counted_on_the_terminal(tmp_path: Path) -> None:
    records = [{"messages": [USER | {"mood": "curious"}, ASSISTANT | {"content": str(i)}], "id": i, "source": "web"} for i in range(3)]
    assert (
        build_rows(tmp_path, records).warnings()[-1] == "columns and parts of messages are not read: id (3), messages.mood (3), source (3)"
    )


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
    assert run.warnings() == ["the system prompt is only for conversations: 1 rows of other formats do not get it"]


# --- generator and hub ------------------------------------------------------------------------------------------------


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
        ({"task": "chain_sums"}, r"sources\.0\.task: found chain_sums, expected"),
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
