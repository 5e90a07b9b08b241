"""What is trained of conversations under other people's chat templates: answers as they are asked for, and nothing else.

Needs the torch runtime, but no model: tokens and masks are looked at themselves.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import build_rows
from pico import tokenizer
from sft_tools import ROWS, request_for
from template_table import BEGIN, CALL, DOCUMENT, MARKERS, TOOL, asked, parts, said, table, templates
from tokenizers.processors import TemplateProcessing

from tasks import sft
from tasks.loading import check_ends, load_tokenizer, save_configs, saved_tokenizer, template_hash
from tasks.masks import Tokens, prompt_ids, reference, sequences, tokenize
from tasks.rendering import check_end, conversation, ends, form, unrendered
from tasks.rows import Row, read_rows, write_rows
from tasks.scoring import exact_match
from tuneline.errors import StageFailed
from tuneline.protocol import Events, Input
from tuneline.trainings import SftStage

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# An empty block of thoughts before the last answer alone.
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
)
ENDS_WHOLE = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
OPENS = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"  # and drops the block of what was said
INDENTS = TURN.replace("{{ m.role }}\n", "{{ m.role }}: ") + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
THREE = asked(*(said(role, f"{role[0]}{i}") for i in (1, 2, 3) for role in ("user", "assistant")))


@lru_cache
def kept() -> tuple[Any, str]:
    found = tokenizer()
    return found, found.chat_template


def words(template: str = "") -> Any:
    """SmolLM2's tokenizer, by default with its own template: one for all tests, because it takes a second to load."""
    found, own = kept()
    found.chat_template = template or own
    return found


def trained(tokens: Tokens, by: Any) -> str:
    return "".join(parts(tokens, by, True))


def test_the_table_in_the_documents_is_what_happens() -> None:
    """And each of TRL's templates trains one turn and several."""
    lines = table(tokenizer())
    found = [line.split(" | ")[1:4] for line in lines.splitlines()[2:]]
    assert len(found) == len(templates()) >= 35
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


def test_sft_knows_the_row_of_each_sequence(tmp_path: Path) -> None:
    rows = [replace(THREE, id="three"), replace(asked(said("user", "Q"), said("assistant", "A")), id="one")]
    request = request_for(tmp_path, Input(path=tmp_path, digest="0" * 64, type="Model"), rows)
    stage = request.stage()
    assert isinstance(stage, SftStage)
    found, ids = sft.tokenized(request, stage, words(THINKS_LAST), "train")
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


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<repo_name>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}<file_sep>{% endfor %}<|im_end|>\n{% endfor %}" + ASK
)
THOUGHT = "<think>\nBecause.\n</think>\n\nA"


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("", asked(said("user", "Q"), said("assistant", "\n A")), "\n A"),
        (THINKS_LAST, asked(said("user", "Q"), said("assistant", "A")), "<think>\n\n</think>\n\nA"),
        (OPENS, asked(said("user", "Q"), said("assistant", "A")), "\n</think>\n\nA"),
        (ENDS_WHOLE, THREE, "a3"),
        (TURN.replace("m.content", "m.content | upper") + ASK, asked(said("user", "Q"), said("assistant", "a")), "A"),
        ("", Row("s", messages=(said("user", "Q"), said("assistant", "A")), answer="42"), "42"),
        ("", Row("s", prompt="Q", completion=" A"), " A"),
        ("", asked(said("user", "Q")), None),
        ("", asked(said("user", "Q"), said("assistant", "", tool_calls=[CALL])), None),  # the template leaves calls out
        (CALLS, asked(said("user", "Q"), said("assistant", "", tool_calls=[CALL])), 'alarm {"zone": "Oslo", "at": "7:30"}'),
    ],
)
def test_the_reference_is_what_the_model_is_taught_to_say(template: str, row: Row, expected: str | None) -> None:
    assert reference(row, words(template)) == expected


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


SYSTEM = said("system", "You are polite.")
QUESTION, ANSWER = said("user", "Q"), said("assistant", "A")
CALLED = asked(QUESTION, said("assistant", "", tool_calls=[CALL]), tools=[TOOL])
AS_TEXT = {"type": "function", "function": CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}}
SPEAKERS = TURN.replace("{% for m in messages %}", "{% for m in messages if m.role in ['user', 'assistant'] %}") + ASK
NAMED = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments.zone }}")
WITH_TOOLS = "{{ tools | tojson if tools }}" + CALLS


@pytest.mark.parametrize(
    ("template", "row", "missing"),
    [
        ("", asked(SYSTEM, QUESTION, ANSWER), []),
        (SPEAKERS, asked(SYSTEM, QUESTION, ANSWER), ["messages[0].content"]),
        (SPEAKERS, asked(QUESTION, ANSWER, said("tool", "A"), ANSWER), ["messages[3].content"]),  # the last A was found as the tool's
        ("", CALLED, ["messages[1].tool_calls[0].name", "messages[1].tool_calls[0].arguments", "tools[0]"]),
        (CALLS, CALLED, []),
        (CALLS, asked(QUESTION, said("assistant", "", tool_calls=[CALL]), tools=[{"name": "other"}]), ["tools[0]"]),
        (WITH_TOOLS, CALLED, []),
        (WITH_TOOLS, asked(QUESTION, said("assistant", "", tool_calls=[AS_TEXT]), tools=[TOOL]), []),
        (NAMED, CALLED, ["messages[1].tool_calls[0].arguments"]),
        ("", asked(QUESTION, said("assistant", "A", reasoning_content="Why")), ["messages[1].reasoning_content"]),
        ("", asked(QUESTION, said("assistant", THOUGHT)), []),
        (OPENS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"), asked(QUESTION, said("assistant", THOUGHT)), []),
        ("", asked(said("user", '\n say "hi"\t'), said("assistant", " é\n")), []),
        (TURN.replace("m.content", "m.content | tojson") + ASK, asked(said("user", 'say "hi"\té'), said("assistant", " é\n")), []),
        (TURN.replace("m.content", "m.content | trim") + ASK, asked(said("user", "\n x "), said("assistant", " é\n")), []),
        (
            TURN.replace("m.content", "m.content[:9]") + ASK,
            asked(said("user", "x"), said("assistant", "0123456789")),
            ["messages[1].content"],
        ),
        (THINKS_LAST, THREE, []),
    ],
)
def test_what_the_template_leaves_out_is_found(template: str, row: Row, missing: list[str]) -> None:
    by = words(template)
    assert unrendered(row, conversation(row, by)) == missing


def test_the_dataset_and_sft_refuse_rows_of_which_something_is_left_out(tmp_path: Path) -> None:
    base = Input(path=tmp_path / "base", digest="0" * 64, type="Model")
    words(SPEAKERS).save_pretrained(base.path)
    records = [{"messages": [QUESTION, ANSWER]}, {"messages": [SYSTEM, QUESTION | {"content": "R"}, ANSWER]}]
    with pytest.raises(StageFailed, match=r"data\.jsonl:2: the chat template .* leaves out messages\[0\]\.content\n") as failure:
        build_rows(tmp_path, records, model=base)
    assert failure.value.failure_class == "data"
    assert "on_unrendered: drop" in failure.value.hint
    dropped = build_rows(tmp_path, records, model=base, on_unrendered="drop")
    assert (len(dropped.every()), dropped.result.metrics["unrendered"]) == (1, 1)
    assert "rows of which the chat template leaves something out are dropped" in dropped.warnings()[0]
    kept = build_rows(tmp_path, records, model=base, on_unrendered="keep")
    assert (len(kept.every()), kept.result.metrics["unrendered"]) == (2, 0)
    assert any("1 of 2 rows are kept although" in warning for warning in kept.warnings())

    request = request_for(tmp_path / "sft", base, kept.every())
    stage = request.stage()
    assert isinstance(stage, SftStage)
    with pytest.raises(StageFailed, match=r"leaves out messages\[0\]\.content of row [0-9a-f]+\n"):
        sft.tokenized(request, stage, words(SPEAKERS), "train")
    assert len(sft.tokenized(request, stage.model_copy(update={"on_unrendered": "keep"}), words(SPEAKERS), "train")[1]) == 2


def test_calls_and_schemas_are_written_in_the_files_order(tmp_path: Path) -> None:
    write_rows([CALLED], tmp_path / "rows.parquet")
    (read,) = read_rows(tmp_path / "rows.parquet")
    by = words(WITH_TOOLS)
    assert conversation(read, by) == conversation(CALLED, by)
    assert '{"zone": "Oslo", "at": "7:30"}' in conversation(read, by)


NO_END = TURN.replace("<|im_end|>", "") + ASK


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURN + ASK, ["<|im_end|>"]),
        (ENDS_WHOLE, ["<|im_end|>", "<|endoftext|>"]),
        (THINKS_LAST, ["<|im_end|>"]),
        (CALLS, ["<|im_end|>"]),  # not the mark after a call, which another one may follow
        (NO_END, []),
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
    with pytest.raises(StageFailed, match=r"<\|im_end\|> would not end an answer") if before in (0, None, [7, 9]) else nullcontext():
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
        ("{{ messages | length }}" + TURN + ASK, "renders row r so that the text before message 1 changes with the message itself"),
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
