"""What is compared where an answer is scored: what the model says, apart from its thoughts, with what it is taught to say."""

from __future__ import annotations

from typing import Any

import pytest
from pico import tokenizer
from template_table import CALL, TOOL, asked, more_templates, said, templates, with_markers
from template_tools import ASK, CALLS, ENDS_WHOLE, OPENS, THINKS_LAST, THOUGHT, THREE, TURN, words

from tasks.data import thoughts
from tasks.data.masks import in_the_order_of, sequences, with_reference
from tasks.data.rendering import ends
from tasks.data.rows import Row
from tasks.scoring.scores import exact_match
from tuneline.errors import StageFailed


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("", asked(said("user", "Q"), said("assistant", "\n A")), "A"),
        (THINKS_LAST, asked(said("user", "Q"), said("assistant", "A")), "A"),
        (OPENS, asked(said("user", "Q"), said("assistant", "A")), "A"),
        (ENDS_WHOLE, THREE, "a3"),
        (TURN.replace("m.content", "m.content | upper") + ASK, asked(said("user", "Q"), said("assistant", "a")), "A"),
        ("", Row("s", messages=(said("user", "Q"), said("assistant", "A")), answer="42"), "42"),
        ("", Row("s", prompt="Q", completion=" A"), " A"),
        ("", asked(said("user", "Q")), None),
        ("", asked(said("user", "Q"), said("assistant", "A", weight=0)), None),
        ("", asked(said("user", "Q"), said("assistant", "", tool_calls=[CALL])), None),  # the template leaves calls out
        (CALLS, asked(said("user", "Q"), said("assistant", "", tool_calls=[CALL])), 'alarm {"zone": "Oslo", "at": "7:30"}'),
    ],
)
def test_the_reference_is_what_the_model_is_taught_to_say(template: str, row: Row, expected: str | None) -> None:
    assert with_reference(row, words(template)).answer == expected


@pytest.mark.parametrize(
    ("answer", "right", "calls", "expected"),
    [
        (THOUGHT, "A", False, 1.0),
        ("\n</think>\n\nA", "<think>\n\n</think>\n\nA", False, 1.0),
        ("[THINK]Because.[/THINK]A", "A", False, 1.0),
        ("<think>\nA", "A", False, 0.0),  # cut off while it was thinking
        ("<think>A</think>B", "A", False, 0.0),
        ("a <b> {", "a <b> {", False, 1.0),
        (
            '<tool_call>{"b": 1,\n "a": {"d": 2, "c": 3}}</tool_call>',
            '<tool_call>\n{"a": {"c": 3, "d": 2}, "b": 1}\n</tool_call>',
            True,
            1.0,
        ),
        ('{"b": 1, "a": 2}', '{"a": 2, "b": 1}', False, 0.0),
        ('call {"b": 1}', 'call {"b": 2}', True, 0.0),
        ('{"b": 1} {"c": 2}', '{"c": 2} {"b": 1}', True, 0.0),
        ('other {"b": 1}', 'call {"b": 1}', True, 0.0),
        ('call {"b": 1', 'call {"b": 1', True, 1.0),
        ("", 'call {"b": 1}', True, 0.0),
    ],
)
def test_answers_are_compared_without_thoughts_and_calls_without_the_order_of_keys(
    answer: str, right: str, calls: bool, expected: float
) -> None:
    assert exact_match(answer, right, calls) == expected


WHY = {"reasoning_content": "Why not A2?"}
ALARM = said("assistant", "", tool_calls=[CALL])


def asked_and_answered(row: Row, by: Any) -> tuple[str, str]:
    """The prompt of the last answer, and what a model writes that has learnt it."""
    tokens = sequences(row, by, "completion")[-1]
    start = tokens.trained.index(True) if any(tokens.trained) else len(tokens.trained)
    return by.decode(tokens.input_ids[:start]), thoughts.written(tokens.input_ids[start:], by, set(ends(by)))


def test_thoughts_count_on_neither_side_however_a_template_marks_them() -> None:
    """In each template that shows them: channels, blocks, and blocks that the generation prompt has opened."""
    by = with_markers(tokenizer())
    question, result, done = said("user", "Q1"), said("tool", "T1", tool_call_id=CALL["id"]), said("assistant", "A1")
    kinds = {"answers": [question, done], "calls": [question, ALARM], "after calls": [question, ALARM, result, done]}
    found: dict[str, set[str]] = {kind: set() for kind in kinds}
    for name, by.chat_template in {**templates(), **more_templates()}.items():
        for kind, messages in kinds.items():
            tools = {} if kind == "answers" else {"tools": [TOOL]}
            plain, thoughtful = (asked(*messages[:-1], messages[-1] | extra, **tools) for extra in ({}, WHY))
            try:
                prompt, text = asked_and_answered(thoughtful, by)
                right = with_reference(plain, by).answer
            except StageFailed:
                continue
            if WHY["reasoning_content"] not in text or (kind == "calls" and "Oslo" not in text):
                continue
            found[kind].add(name)
            assert "Oslo" in str(right) if kind == "calls" else right == "A1", (name, right)
            assert with_reference(thoughtful, by).answer == right, name
            for written in (text, asked_and_answered(plain, by)[1]):
                assert exact_match(thoughts.said(written, prompt, by), str(right), kind == "calls") == 1.0, (name, written)
            assert thoughts.said(text[: text.index("A2")], prompt, by) == "", (name, text)  # cut off
    assert found["after calls"] >= {"gptoss", "gemma4_v5", "diffusion_gemma", "qwen3", "command_a_reasoning"}
    assert found["answers"] >= {
        "gptoss",
        "gemma4_v5",
        "muse_glimmer",
        "qwen3",
        "qwen3_6",
        "deepseek_r1_distill",
        "glm4moe",
        "nemotron_3_nano",
    }
    assert found["answers"] >= {"command_a_reasoning", "seed_oss"}
    assert found["calls"] >= {"gptoss", "gemma4_v3", "gemma4_v5", "muse_glimmer", "qwen3", "qwen3_6"}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[THINK]Why[/THINK]A", "A"),
        ("[THINK]Why", ""),
        ("<|START_THINKING|>Why<|END_THINKING|><|START_RESPONSE|>A<|END_RESPONSE|>", "A"),
        ("<seed:think>Why</seed:think>A", "A"),
        ("A <b> [x]", "A <b> [x]"),
        ("assistant\nA", "assistant\nA"),
    ],
)
def test_thoughts_that_no_template_marks_are_known_by_their_tags(written: str, expected: str) -> None:
    """Tokens of their own, which would be gone from a text without special tokens."""
    by = with_markers(tokenizer())
    by.chat_template = TURN + ASK
    ids = by(written + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert thoughts.said(thoughts.written(ids, by, set(ends(by))), "", by) == expected


def test_calls_are_the_same_in_whatever_order_a_model_writes_their_arguments() -> None:
    """Also where a template writes them as tags, as Python or in a way of its own: each that the pico tokenizer can tell apart."""
    by = with_markers(tokenizer())
    calls = [CALL, {**CALL, "function": {"name": "alarm", "arguments": {"zone": "Rome", "at": "8:00"}}}]
    swapped = [
        {**call, "function": call["function"] | {"arguments": dict(reversed(call["function"]["arguments"].items()))}} for call in calls
    ]
    other = [{**calls[0], "function": calls[1]["function"]}, {**calls[1], "function": calls[0]["function"]}]
    compared = set()
    for name, by.chat_template in {**templates(), **more_templates()}.items():
        for count in (1, 2):
            row, turned, wrong = (
                asked(said("user", "Q1"), said("assistant", "", tool_calls=each[:count]), tools=[TOOL]) for each in (calls, swapped, other)
            )
            try:
                row = with_reference(row, by)
                texts = [with_reference(each, by).answer or "" for each in (turned, wrong)]
            except StageFailed:
                continue
            if row.answer and "Oslo" in row.answer and (count == 1 or "Rome" in row.answer):
                scores = [exact_match(in_the_order_of(row, text, by), row.answer, row.calls()) for text in texts]
                assert scores == [1.0, 0.0], (name, row.answer, texts)
                compared.add((name, count))
    assert {name for name, _ in compared} >= {
        "qwen3",
        "qwen3_6",
        "lfm2_v2",
        "glm4moe",
        "gemma4_v5",
        "seed_oss",
        "deepseekv3",
        "mistral_v0_3",
    }


def test_what_a_template_without_a_generation_prompt_writes_before_an_answer_is_none_of_it() -> None:
    by = words(TURN)
    row = asked(said("user", "Q"), said("assistant", "A"))
    prompt, text = asked_and_answered(row, by)
    assert text.startswith("<|im_start|>assistant\nA")
    assert thoughts.said(text, prompt, by) == with_reference(row, by).answer == "A"
