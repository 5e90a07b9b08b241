"""Which answers count in the loss, and that every prompt has the tokens that a server sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from program_tools import run_program
from sft_tools import request_for
from template_table import asked, said
from template_tools import ASK, THINKS_LAST, THREE, TURN, trained, words

from tasks.data.masks import prompt_ids, sequences
from tasks.data.rows import Row
from tuneline.errors import StageFailed
from tuneline.kinds.sft import LastAnswers
from tuneline.workspace.protocol import Input

END = "<|im_end|>\n"
TWO = LastAnswers(last=2)
SILENT = asked(said("user", "u1"), said("assistant", "a1"), said("user", "u2"), said("assistant", "a2", weight=0))


@pytest.mark.parametrize(
    ("template", "row", "train_on", "expected"),
    [
        ("", THREE, TWO, [f"a2{END}a3{END}"]),
        ("", THREE, LastAnswers(last=9), [f"a1{END}a2{END}a3{END}"]),
        ("", SILENT, TWO, [f"a1{END}"]),
        (THINKS_LAST, THREE, TWO, [f"<think>\n\n</think>\n\na2{END}", f"<think>\n\n</think>\n\na3{END}"]),
        ("", Row("s", prompt="Q", completion=" A"), TWO, [" A<|im_end|>"]),
        ("", Row("s", text="T"), TWO, ["T<|im_end|>"]),
    ],
)
def test_the_last_answers_are_trained(template: str, row: Row, train_on: LastAnswers, expected: list[str]) -> None:
    by = words(template)
    assert [trained(tokens, by) for tokens in sequences(row, by, train_on)] == expected


def test_rows_without_one_of_them_to_learn_are_left_out(tmp_path: Path, base: Input) -> None:
    rows = [
        asked(said("user", f"u{i}"), said("assistant", "a1"), said("user", "u2"), said("assistant", "a2", weight=i % 2), said("user", "u3"),
              said("assistant", "a3", weight=0))
        for i in range(4)
    ]  # fmt: skip
    rows = [Row("s", messages=row.messages, id=f"row{i}", group=str(i)) for i, row in enumerate(rows)]
    request = request_for(tmp_path / "run", base, rows, train_on={"last": 2}, max_steps=1)
    _, events = run_program(request)
    warned = [event["message"] for event in events if event["type"] == "warning"]
    assert warned == ["2 of 4 train rows end with answers of weight 0, for example row row0: with `train_on: {last: 2}` they are left out"]
    with pytest.raises(StageFailed, match=r"with `train_on: \{last: 2\}` no row is left"):
        run_program(request_for(tmp_path / "none", base, rows[:1], train_on={"last": 2}, max_steps=1))


CLOSES = TURN + ASK[:-11] + "<think>\n\n</think>\n\n{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        CLOSES.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"),
        "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}<|im_end|>\n\n{% endfor %}{% if add_generation_prompt %}assistant:\n\n{% endif %}",
    ],
)
@pytest.mark.parametrize(
    "row", [asked(said("user", "Q"), said("assistant", "An")), THREE, asked(said("user", "Q"), said("assistant", " A"))]
)
def test_prompts_have_the_tokens_that_a_server_sends(template: str, row: Row) -> None:
    """Also where they end with line ends, which a tokenizer joins at the end of a text, but not before a word."""
    by, found = words(template), list[Any]()
    for tokens in sequences(row, by):
        ids = [token for token, counts in zip(tokens.input_ids, tokens.trained, strict=True) if not counts]
        found.append((ids, trained(tokens, by)))
    assert row.messages is not None
    answers = [place for place, message in enumerate(row.messages) if message["role"] == "assistant"]
    asked_for = [prompt_ids(Row("s", messages=row.messages[:place]), by) for place in answers]
    assert [ids for ids, _ in found] == asked_for
    assert [answer.split("<")[0] for _, answer in found] == [row.messages[place]["content"] for place in answers]
