"""Rows as people write them: what is read although it is no text, and what is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import build, build_rows
from template_table import said

from tuneline.errors import StageFailed

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.parametrize(
    ("result", "content"),
    [
        (7, "7"),
        (1.5, "1.5"),
        (True, "true"),
        ({"b": [1, "é"], "a": None}, '{"b": [1, "é"], "a": null}'),
        ([{"id": 1}], '[{"id": 1}]'),
        ([], "[]"),
        ("", ""),
        (None, ""),
        ([{"type": "text", "text": "7"}], "7"),
    ],
)
def test_a_tool_may_give_back_anything(tmp_path: Path, result: Any, content: str) -> None:
    messages = [
        said("user", "Q"),
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": result},
        said("assistant", "A"),
    ]
    (row,) = build_rows(tmp_path, [{"messages": messages}]).rows()
    assert row.messages is not None
    assert row.messages[2]["content"] == content
    turns = [{"from": "human", "value": "Q"}, {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {}})}]
    turns += [{"from": "observation", "value": result}, {"from": "gpt", "value": "A"}]
    (row,) = build_rows(tmp_path, [{"conversations": turns}]).rows()
    assert row.messages is not None
    assert row.messages[2]["content"] == content


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ('{"instruction": "1 + 3", "input": 0, "output": 4}', "4"),
        ('{"prompt": "a", "completion": 1.10}', "1.10"),
        ('{"messages": [{"role": "user", "content": 12345678901234567890123}, {"role": "assistant", "content": 4}]}', "4"),
        ('{"instruction": "q", "output": 5, "history": [["a", 3]]}', "5"),
    ],
)
def test_numbers_are_text_as_the_file_writes_them(tmp_path: Path, row: str, answer: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n", encoding="utf-8")
    (found,) = build(tmp_path, [{"type": "files", "path": "a.jsonl"}]).rows()
    assert found.reference() == answer
    if found.messages is not None:
        assert all(isinstance(message["content"], str) for message in found.messages)


def test_roles_of_any_case_and_the_names_of_sharegpts_models(tmp_path: Path) -> None:
    named = [("Human", "ChatGPT"), ("USER", "Assistant"), ("user", "model"), ("human", "bot")]
    rows = [
        {"conversations": [{"from": asks, "value": f"Q{i}"}, {"from": answers, "value": "A"}]} for i, (asks, answers) in enumerate(named)
    ]
    for row in build_rows(tmp_path, rows).rows():
        assert row.messages is not None
        assert [message["role"] for message in row.messages] == ["user", "assistant"]
    with pytest.raises(StageFailed, match=r"conversations\[1\]\.from: found 'Narrator', expected system"):
        build_rows(tmp_path, [{"conversations": [{"from": "human", "value": "Q"}, {"from": "Narrator", "value": "A"}]}])


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.csv", "prompt, completion\na, b\n", "found the column ' completion', expected names without space", "remove the spaces"),
        ("a.json", '{"data": [{"prompt": "a", "completion": "b"}]}', "found no list", "write its list of rows alone"),
        (
            "a.json",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n',
            "found no list",
            "one object a line: name the file .jsonl",
        ),
        ("a.jsonl", '{"prompt": "a", "completion": true}\n', "completion as bool True, expected both text", "fix or remove"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": ["a"]}, {"role": "tool"}]}\n',
            r"messages\[1\].content: found nothing",
            "fix",
        ),
    ],
)
def test_files_that_are_refused_say_what_to_change(tmp_path: Path, name: str, content: str, message: str, hint: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(StageFailed, match=message) as failure:
        build(tmp_path, [{"type": "files", "path": name}])
    assert failure.value.hint.startswith(hint)
