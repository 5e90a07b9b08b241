"""Rows with two answers, and labels: every form reads to the same row, and nothing of it is lost on the way to a report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import build_rows
from pico import tokenizer

from tasks.data.formats import detect, to_row
from tasks.data.masks import with_reference
from tasks.data.rows import Row, read_rows
from tasks.data.unrendered import lost_in_training
from tasks.data.values import BadRow
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input

ASK, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
FROM = {"user": "human", "assistant": "gpt"}


def sharegpt(message: dict[str, str]) -> dict[str, str]:
    return {"from": FROM[message["role"]], "value": message["content"]}


FORMS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "a prompt as text": {"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
    "answers as text": {"prompt": [ASK], "chosen": "4", "rejected": "5"},
    "an implicit prompt": WHOLE,
    "UltraFeedback": {"prompt": "2 + 2?", "prompt_id": "x", "messages": [ASK, GOOD], **WHOLE, "score_chosen": 8.0},
    "LLaMA-Factory, ShareGPT": {"conversations": [sharegpt(ASK)], "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)},
    "LLaMA-Factory, OpenAI": {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory, Alpaca": {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    "ms-swift": {"messages": [ASK, GOOD], "rejected_response": "5"},
    "ms-swift, messages": {"messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]},
    "JSON text": {"prompt": json.dumps([ASK]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
}


def read(record: dict[str, Any]) -> tuple[Row, Counter[str]]:
    ignored: Counter[str] = Counter()
    return to_row(record, detect(record), "sources.0", ignored), ignored


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_reads_to_the_same_row(form: str) -> None:
    row, ignored = read(FORMS[form])
    assert row == Row("sources.0", messages=(ASK, GOOD), rejected=BAD)
    assert set(ignored) == ({"prompt_id", "messages", "score_chosen"} if form == "UltraFeedback" else set())
    assert [each.messages for each in row.alternatives()] == [(ASK, GOOD), (ASK, BAD)]


def test_pairs_as_text_and_labels() -> None:
    assert read({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})[0] == Row("sources.0", prompt="2 + 2?", completion="4", rejected="5")
    for name, value, label in (("label", True, True), ("kto_tag", False, False), ("label", "false", False), ("kto_tag", "True", True)):
        assert read({"messages": [ASK, GOOD], name: value})[0].label is label
    assert read({"prompt": "2 + 2?", "completion": "4", "label": False})[0] == Row(
        "sources.0", prompt="2 + 2?", completion="4", label=False
    )
    row, ignored = read({"messages": [ASK, GOOD], "label": 3})  # a class, as in datasets for classification
    assert (row.label, dict(ignored)) == (None, {"label": 1})


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "same": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4 "}, "chosen and rejected are the same"),
    "same messages": ({"messages": [ASK, GOOD], "rejected_response": "4"}, "chosen and rejected are the same"),
    "empty": ({"prompt": "2 + 2?", "chosen": "4", "rejected": ""}, "rejected: found empty text"),
    "empty response": ({"messages": [ASK, GOOD], "rejected_response": " "}, "rejected_response: found empty text"),
    "no prompt": ({"chosen": "4", "rejected": "5"}, "found no prompt beside chosen and rejected"),
    "two prompts": ({"prompt": [ASK], "instruction": "a", "chosen": "4", "rejected": "5"}, "found instruction and prompt beside chosen"),
    "two forms": ({"chosen": [ASK, GOOD], "rejected": [BAD]}, "found one answer and one conversation as chosen and rejected"),
    "parted early": (
        {"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD, ASK, GOOD]},
        "found 4 and 4 messages that differ from message 1 on",
    ),
    "no question": ({"chosen": [ASK], "rejected": [ASK, BAD]}, "differ from message 1 on"),
    "another prompt": ({"prompt": "3 + 3?", **WHOLE}, "prompt: found text that is not in the conversations"),
    "a weight": ({"prompt": [ASK], "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "chosen: found an answer of weight 0"),
    "label and pair": ({"messages": [ASK, GOOD], "rejected_response": "5", "label": True}, "found rejected_response and label"),
    "label of a question": ({"messages": [ASK], "label": True, "answer": "4"}, "found a label without an answer"),
    "tag": ({"messages": [ASK, GOOD], "kto_tag": 3}, "kto_tag: found int 3, expected true or false"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pairs_that_cannot_be_compared_are_bad_rows(fault: str) -> None:
    record, message = FAULTS[fault]
    with pytest.raises(BadRow, match=message):
        read(record)


def test_a_dataset_of_pairs_keeps_both_answers(tmp_path: Path, base: Input) -> None:
    """Other answers to one prompt are one group; the rejected answer is part of the identity; lengths are those of the longer answer."""
    records = [{"prompt": [ASK], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": text}]} for text in ("5", "6 " * 30, "5")]
    other = {"messages": [{"role": "user", "content": "3 + 3?"}, GOOD], "label": False}
    done = build_rows(tmp_path, records, model=base, system="Add.")
    rows = read_rows(done.request.payload / "train.parquet")
    assert [row.rejected["content"] for row in rows if isinstance(row.rejected, dict)] == ["5", "6 " * 30]
    assert len({row.group for row in rows}) == 1
    assert done.result.metrics["pairs"] == 2
    assert done.result.metrics["tokens_max"] > done.result.metrics["tokens_p50"] + 30
    report = (done.request.meta / "report.md").read_text()
    assert "Rows for preference training: 2 pairs" in report
    assert "⟦4<|im_end|>\n⟧\n\n--- rejected:\n" in report
    assert not [event for event in done.events if event["type"] == "warning" and "different answers" in event["message"]]
    labeled = build_rows(tmp_path / "labels", [other]) if (tmp_path / "labels").mkdir() is None else None
    assert labeled is not None
    (row,) = read_rows(labeled.request.payload / "train.parquet")
    assert (row.label, row.reference(), with_reference(row, tokenizer()).answer) == (False, None, None)


def test_what_is_wrong_with_a_rejected_answer_is_named(tmp_path: Path, base: Input) -> None:
    end = {"prompt": [ASK], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": "<|im_end|>"}]}
    with pytest.raises(StageFailed, match=r"data\.jsonl:1: found the special token <\|im_end\|> written out"):
        build_rows(tmp_path, [end], model=base)
    escaped = build_rows(tmp_path, [end], model=base, special_tokens="escape")
    (row,) = read_rows(escaped.request.payload / "train.parquet")
    assert isinstance(row.rejected, dict)
    assert row.rejected["content"] == "< |im_end|>"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    calls = Row("s", messages=(ASK, GOOD), rejected={"role": "assistant", "content": "", "tool_calls": [call]})
    assert lost_in_training(calls, tokenizer()) == ["rejected.tool_calls[0].name", "rejected.tool_calls[0].arguments"]
