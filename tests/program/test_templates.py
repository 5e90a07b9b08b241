"""What is trained of conversations under other people's chat templates: answers as they are asked for, and nothing else.

Needs the torch runtime, but no model: tokens and masks are looked at themselves.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pico import tokenizer
from sft_tools import ROWS, request_for
from template_table import BEGIN, DOCUMENT, MARKERS, TOOL, asked, more_templates, said, tables, templates
from template_tools import ANSWER, ASK, CALLS, ENDS_WHOLE, OPENS, QUESTION, SYSTEM, THINKS_LAST, THREE, TURN, trained, words
from tokenizers.processors import TemplateProcessing

from tasks.data.endings import check_ends, save_configs
from tasks.data.masks import prompt_ids, sequences, tokenize
from tasks.data.rendering import check_end, conversation, ends, form
from tasks.data.rows import Row
from tasks.data.unrendered import unrendered
from tasks.models.loading import load_tokenizer, saved_tokenizer, template_hash
from tasks.training import sft
from tuneline.errors import StageFailed
from tuneline.kinds.sft import SftStage
from tuneline.workspace.protocol import Events, Input

INDENTS = TURN.replace("{{ m.role }}\n", "{{ m.role }}: ") + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"


def test_the_table_in_the_documents_is_what_happens() -> None:
    """And each template trains one turn and several."""
    lines = tables(tokenizer())
    found = [line.split(" | ")[1:4] for line in lines.splitlines() if line.startswith("| `")]
    assert len(found) == len(templates()) + len(more_templates()) >= 55
    assert all(cell in ("yes", "yes (3)") for line in found for cell in line), lines
    assert DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2] == lines, "python tests/support/template_table.py"


@pytest.mark.parametrize(("train_on", "digest"), [("assistant", "7a8432b3680d4e0f"), ("completion", "dd7498ad2b6b419f"), ("all", "d77f7a340caba4de")])  # fmt: skip
def test_the_demos_template_gives_the_tokens_and_masks_that_it_always_gave(train_on: str, digest: str) -> None:
    """Recorded when an answer was still found by tokenizing the conversation up to it."""
    found = [sequences(row, words(), train_on) for row in ROWS]
    assert all(len(each) == 1 for each in found)
    document = json.dumps([(tokens.input_ids, tokens.trained) for (tokens,) in found])
    assert hashlib.sha256(document.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (THINKS_LAST, [f"<think>\n\n</think>\n\na{i}<|im_end|>\n" for i in (1, 2, 3)]),
        (ENDS_WHOLE, [f"a{i}<|im_end|>\n<|endoftext|>" for i in (1, 2, 3)]),
        (OPENS, [f"\n</think>\n\na{i}<|im_end|>\n" for i in (1, 2, 3)]),
    ],
)
def test_where_earlier_turns_change_each_answer_is_trained_as_it_is_asked_for(template: str, answers: list[str]) -> None:
    by = words(template)
    found = sequences(THREE, by)
    assert [trained(tokens, by) for tokens in found] == answers
    assert THREE.messages is not None
    for tokens, last in zip(found, (2, 4, 6), strict=True):
        prompt = prompt_ids(asked(*THREE.messages[:last]), by)  # what a server sends
        assert tokens.input_ids[: len(prompt)] == prompt
        assert tokens.trained == [False] * len(prompt) + [True] * (len(tokens.input_ids) - len(prompt))
    assert sequences(THREE, by, "completion") == [found[-1]]
    assert tokenize(THREE, by, "all").input_ids == by(by.decode(found[-1].input_ids), add_special_tokens=False)["input_ids"]


def test_a_system_prompt_that_moves_with_the_last_question_is_in_every_prompt() -> None:
    """As in Mistral's: whole conversations are rendered without it."""
    by = words(more_templates()["mistral_v0_3"])
    row = asked(SYSTEM, *(THREE.messages or ()), tools=[TOOL])
    found = sequences(row, by)
    assert [trained(tokens, by) for tokens in found] == [f" a{i}<|im_end|>" for i in (1, 2, 3)]
    texts = [by.decode(tokens.input_ids) for tokens in found]
    assert [text.count("You are polite.") for text in texts] == [text.count("Wakes.") for text in texts] == [1, 1, 1]
    assert "[INST] You are polite.\n\nu3[/INST] a3" in texts[2]
    assert unrendered(row, conversation(row, by), by) == []


@pytest.mark.parametrize("model", ["hermes", "command_r"])
def test_of_several_templates_the_one_for_tools_renders_rows_with_tools(model: str) -> None:
    by = words(more_templates()[model])
    texts = [conversation(asked(QUESTION, ANSWER, **extra), by) for extra in ({}, {"tools": [TOOL]})]
    assert ["Wakes." in text for text in texts] == [False, True]
    by.chat_template = {"rag": by.chat_template["default"], "tool_use": by.chat_template["tool_use"]}
    with pytest.raises(StageFailed, match="refuses row r: .*multiple chat templates with no default"):
        conversation(asked(QUESTION, ANSWER), by)


def test_a_last_answer_ends_as_an_earlier_one_does() -> None:
    """Where the template writes an end only if the conversation goes on, as that of Qwen1.5."""
    by = words(ENDS_BETWEEN)
    (tokens,) = sequences(THREE, by)
    assert trained(tokens, by) == "a1<|im_end|>a2<|im_end|>a3<|im_end|>"
    assert conversation(THREE, by).endswith("a3<|im_end|>")
    check_end([THREE], by, no_end=False)


def test_sft_knows_the_row_of_each_sequence(tmp_path: Path) -> None:
    rows = [replace(THREE, id="three"), replace(asked(said("user", "Q"), said("assistant", "A")), id="one")]
    request = request_for(tmp_path, Input(path=tmp_path, digest="0" * 64, type="Model"), rows)
    stage = request.stage()
    assert isinstance(stage, SftStage)
    found, ids = sft.tokenized(request, stage, words(THINKS_LAST), "train", Events(tmp_path / "events.jsonl"))
    assert ids == ["three", "three", "three", "one"]
    expected = [tokens for row in rows for tokens in sequences(row, words(THINKS_LAST))]
    assert (found["input_ids"], found["labels"]) == ([t.input_ids for t in expected], [t.labels for t in expected])


@pytest.mark.parametrize("answer", ["\n\nA list", "\n", "    indented = 1", " x", "\tx", "🙂", "\n\n🙂"])
@pytest.mark.parametrize("template", ["", INDENTS, OPENS])
def test_answers_that_begin_with_space_are_trained_after_the_servers_prompt(template: str, answer: str) -> None:
    by, row = words(template), asked(said("user", "Q"), said("assistant", answer))
    (tokens,) = sequences(row, by)
    prompt = prompt_ids(row, by)
    assert tokens.input_ids[: len(prompt)] == prompt
    assert tokens.trained == [False] * len(prompt) + [True] * (len(tokens.input_ids) - len(prompt))
    assert trained(tokens, by).removeprefix("\n</think>\n\n") == f"{answer}<|im_end|>\n"
    # Before a next question the row's second answer is asked for as a server tokenizes it; both are trained.
    longer = asked(said("user", "Q"), said("assistant", answer), said("user", "R"), said("assistant", "B"))
    assert "".join(trained(each, by) for each in sequences(longer, by)).count("<|im_end|>") == 2


def test_thoughts_close_the_block_that_the_prompt_opens() -> None:
    by = words(OPENS)
    rows = [
        asked(said("user", "Q"), said("assistant", "A", reasoning_content="Because.")),
        asked(said("user", "Q"), said("assistant", "<think>\nBecause.\n</think>\n\nA")),
    ]
    by.chat_template = OPENS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert [trained(sequences(row, by)[0], by) for row in rows] == ["Because.\n</think>\n\nA<|im_end|>\n"] * 2


@pytest.mark.parametrize(
    ("template", "date"),
    [
        ("llama3_2", "Today Date: 26 Jul 2024\n"),
        ("gptoss", "Current date: 2024-07-26\n"),
        ("{{ strftime_now('%B %d, %Y') }}" + TURN + ASK, "July 26, 2024"),
        ("{{ strftime_now('%-d %B %Y, %I:%M %p %e|%Z|%j') }}" + TURN + ASK, "26 July 2024, 12:00 AM 26||208"),
        ("{% set format = '%A, %H:%M:%S' %}{{ 'It is ' + strftime_now(format) }}" + TURN + ASK, "It is Friday, 00:00:00<"),
    ],
)
def test_a_template_that_reads_the_clock_gets_a_date_that_is_saved_with_it(tmp_path: Path, template: str, date: str) -> None:
    own = tokenizer()
    own.chat_template = templates().get(template, template)
    own.save_pretrained(tmp_path / "base")
    base = Input(path=tmp_path / "base", digest="", type="Adapter", template=template_hash(own))
    by, row = load_tokenizer(base), asked(said("user", "Q"), said("assistant", "A"))
    text = by.decode(tokenize(row, by).input_ids)
    assert date in text
    assert template_hash(by) != template_hash(own)
    by.save_pretrained(tmp_path / "trained")
    trained = base.model_copy(update={"path": tmp_path / "trained", "template": template_hash(by)})
    assert load_tokenizer(trained).chat_template == by.chat_template  # once is enough
    assert saved_tokenizer(by, base.model_copy(update={"template": None})).chat_template == by.chat_template  # an artifact of before


def test_a_template_without_a_clock_is_left_as_it_is(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(Input(path=tmp_path, digest="", type="Adapter")).chat_template == tokenizer().chat_template


NO_END = TURN.replace("<|im_end|>", "") + ASK
ENDS_BETWEEN = TURN.replace("<|im_end|>\n", "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}") + ASK


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURN + ASK, ["<|im_end|>"]),
        (ENDS_WHOLE, ["<|im_end|>", "<|endoftext|>"]),
        (THINKS_LAST, ["<|im_end|>"]),
        (CALLS, ["<|im_end|>"]),  # not the mark after a call, which another one may follow
        (NO_END, []),
        (ENDS_BETWEEN, ["<|im_end|>"]),
        ("{{ raise_exception('nothing pleases it') }}", []),
    ],
)
def test_a_turn_ends_with_what_the_template_writes_after_an_answer(template: str, expected: list[str]) -> None:
    by = words(template)
    eos = by.convert_tokens_to_ids("<|endoftext|>")
    try:
        by.eos_token = "<|endoftext|>"
        assert by.convert_ids_to_tokens(list(form(by).ends)) == expected
        found = [by.convert_tokens_to_ids(token) for token in expected]
        assert ends(by) == list(dict.fromkeys([*found, eos]))
        assert ends(by, 7) == ends(by, [7]) == [*ends(by), 7]
    finally:
        by.eos_token = "<|im_end|>"


def test_a_template_that_ends_no_turn_is_trained_with_where_that_is_wanted() -> None:
    row, plain = asked(said("user", "Q"), said("assistant", "A")), Row("s", prompt="2 + 2 =", completion=" 4")
    with pytest.raises(StageFailed, match="writes no token after an answer") as failure:
        check_end([plain, row], words(NO_END), no_end=False)
    assert "no_end: true" in failure.value.hint
    check_end([plain, row], words(NO_END), no_end=True)
    check_end([plain], words(NO_END), no_end=False)
    check_end([row], words(), no_end=False)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("before", "after"), [(0, [2, 0]), (None, 2), ([7, 2], [7, 2]), ([7, 9], [2, 7, 9])])
def test_what_is_saved_ends_where_an_evaluation_does(tmp_path: Path, name: str, before: Any, after: Any) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_text(json.dumps({"eos_token_id": before, "model_type": "llama"}))
    with pytest.raises(StageFailed, match=r"found no end of an answer at <\|im_end\|>") if before in (0, None, [7, 9]) else nullcontext():
        check_ends(tmp_path / "base", words())
    events = Events(tmp_path / "events.jsonl")
    save_configs(tmp_path / "base", tmp_path, None, words(), events)
    assert json.loads((tmp_path / name).read_text())["eos_token_id"] == after
    check_ends(tmp_path, words())


@pytest.mark.parametrize("start", ["", "<|im_start|>"])
def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tmp_path: Path, start: str) -> None:
    own = tokenizer()
    marks = [(token, own.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    one, two = (f"{start} {texts} <|im_end|>".strip() for texts in ("$A", "$A $B"))
    own.backend_tokenizer.post_processor = TemplateProcessing(single=one, pair=two, special_tokens=marks)
    own.save_pretrained(tmp_path)
    row = Row("s", prompt="2 and 2 are ", completion="4")
    by = load_tokenizer(Input(path=tmp_path, digest="", type="Adapter"))
    assert own(row.prompt)["input_ids"][-1] == own.eos_token_id
    assert by.decode(prompt_ids(row, by)) == f"{start}2 and 2 are "
    assert by.decode(tokenize(row, by).input_ids) == f"{start}2 and 2 are 4<|im_end|>"
    assert by.decode(tokenize(Row("s", text="2"), by).input_ids) == f"{start}2<|im_end|>"
    assert by.decode(by(["a", "b"])["input_ids"][1]) == f"{start}b"


def test_a_greeting_is_a_part_of_the_prompt_alone() -> None:
    """It answers nobody, and no server renders an empty conversation."""
    by, row = words(), asked(said("assistant", "Hello, what is it?"), said("user", "Sum 0"), said("assistant", "It is 0"))
    (tokens,) = sequences(row, by)
    assert trained(tokens, by) == "It is 0<|im_end|>\n"
    assert "Hello, what is it?" in by.decode(tokens.input_ids)


def test_a_tokenizer_that_does_not_tell_where_its_tokens_are_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    by = words()
    rows = [*ROWS, asked(said("user", "Q"), said("assistant", "\n\nA"))]
    before = [sequences(row, by) for row in rows]
    monkeypatch.setattr(type(by), "is_fast", False)
    assert [sequences(row, by) for row in rows] == before


def test_contents_are_parts_and_arguments_are_text_where_the_template_takes_nothing_else() -> None:
    known = templates()
    by = tokenizer()
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": "x", "a": 2}}}
    row = asked(said("user", "Q"), said("assistant", "", tool_calls=[call]))
    as_text = {"type": "function", "function": {"name": "f", "arguments": '{"b": "x", "a": 2}'}}
    for name, wanted in (("deepseekv3", '{"b": "x", "a": 2}'), ("qwen2_5", '"arguments": {"b": "x", "a": 2}')):
        by.chat_template = known[name]
        by.add_tokens(MARKERS.findall(known[name]), special_tokens=True)
        for calls in ([call], [as_text]):
            assert wanted in trained(sequences(asked(row.messages[0], said("assistant", "", tool_calls=calls)), by)[0], by)  # type: ignore[index]
    by.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}\n{% endfor %}{% endfor %}"
    assert trained(sequences(asked(said("user", "Q"), said("assistant", "A")), by)[0], by) == "A\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            TURN.replace("<|im_end|>", "{{ messages | length }}") + ASK,
            "renders row r so that the text before message 1 changes with the message itself",
        ),
        ("{{ messages[5].content }}", "refuses row r: "),
        ("{{ 'a' + 1 }}", 'refuses row r: TypeError: can only concatenate str (not "int") to str'),
        ("{{ [1][3] + 1 }}", "refuses row r: "),
        ("{{ raise_exception('no') }}", "refuses row r: no"),
    ],
)
def test_what_a_template_raises_names_the_row(template: str, message: str) -> None:
    with pytest.raises(StageFailed) as failure:
        sequences(asked(said("user", "Q"), said("assistant", "A")), words(template))
    assert failure.value.failure_class == "data"
    assert message in failure.value.message
    assert failure.value.hint


def test_a_row_without_a_template_is_refused() -> None:
    by = tokenizer()
    by.chat_template = None
    with pytest.raises(StageFailed, match="the model has no chat template"):
        sequences(Row("s", messages=(said("user", "Q"), said("assistant", "A"))), by)
