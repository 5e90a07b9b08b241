"""What a row says and its template leaves out is refused, left out or kept, by every program that renders rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import build_rows
from grpo_tools import SMALL as GRPO
from program_tools import make_request, run_program
from sft_tools import dataset, request_for
from template_table import CALL, TOOL, asked, said
from template_tools import ANSWER, ASK, CALLS, OPENS, QUESTION, SPEAKERS, SYSTEM, THINKS_LAST, THOUGHT, THREE, TURN, WITH_TOOLS, words

from tasks.data.rendering import conversation
from tasks.data.rows import Row, read_rows, write_rows
from tasks.data.unrendered import unrendered
from tasks.evaluation import evaluate as evaluation
from tasks.training import sft
from tuneline.errors import StageFailed
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.sft import SftStage
from tuneline.workspace.protocol import Events, Input

CALLED = asked(QUESTION, said("assistant", "", tool_calls=[CALL]), tools=[TOOL])
AS_TEXT = {"type": "function", "function": CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}}
FIRST_CALL = WITH_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
BOOK = {"type": "function", "function": {"name": "book", "description": "Books.", "parameters": {"type": "object", "properties": {}}}}
BOOKED = [  # the first has all the words of the second
    {"type": "function", "function": {"name": "book", "arguments": {"room": 12, "days": 1}}},
    {"type": "function", "function": {"name": "book", "arguments": {"room": 1, "days": 12}}},
]
AFTER_THOUGHTS = OPENS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
NAMED = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments.zone }}")


@pytest.mark.parametrize(
    ("template", "row", "missing"),
    [
        ("", asked(SYSTEM, QUESTION, ANSWER), []),
        (SPEAKERS, asked(SYSTEM, QUESTION, ANSWER), ["messages[0].content"]),
        (SPEAKERS, asked(QUESTION, ANSWER, said("tool", "A"), ANSWER), ["messages[3].content"]),  # the last A was found as the tool's
        ("", CALLED, ["messages[1].tool_calls[0].name", "messages[1].tool_calls[0].arguments", "tools[0]"]),
        (CALLS, CALLED, ["tools[0]"]),  # the call alone has its name
        (CALLS, asked(said("system", "There is alarm(zone, at)."), *(CALLED.messages or ()), tools=[TOOL]), []),
        (CALLS, asked(QUESTION, said("assistant", "", tool_calls=[CALL]), tools=[{"name": "other"}]), ["tools[0]"]),
        (WITH_TOOLS, CALLED, []),
        (  # all of the call's words stand before it, in the schema and in the question
            "{{ tools | tojson if tools }}" + TURN + ASK,
            asked(said("user", "Oslo, 7:30"), said("assistant", "", tool_calls=[CALL]), tools=[TOOL]),
            ["messages[1].tool_calls[0].name", "messages[1].tool_calls[0].arguments"],
        ),
        (WITH_TOOLS, asked(QUESTION, said("assistant", "", tool_calls=[AS_TEXT]), tools=[TOOL]), []),
        (NAMED, CALLED, ["messages[1].tool_calls[0].arguments", "tools[0]"]),
        ("", asked(QUESTION, said("assistant", "A", reasoning_content="Why")), ["messages[1].reasoning_content"]),
        ("", asked(QUESTION, said("assistant", "A", thinking="Why")), ["messages[1].thinking"]),
        (OPENS, asked(QUESTION, said("assistant", "A", thinking="Why")), []),
        ("", asked(QUESTION, said("assistant", THOUGHT)), []),
        # Thoughts within the answer, thoughts and prompts that are a word of the template's own, thoughts of an earlier answer.
        ("", asked(QUESTION, said("assistant", "So it is A.", thinking="it is A")), ["messages[1].thinking"]),
        ("", asked(QUESTION, said("assistant", "A", thinking="assistant")), ["messages[1].thinking"]),
        (SPEAKERS, asked(said("system", "user"), QUESTION, ANSWER), ["messages[0].content"]),
        ("", asked(said("system", "user"), QUESTION, ANSWER), []),
        *(("", asked(said("user", "How many?"), said("assistant", answer)), []) for answer in ("0", "1", "a", "user", "assistant", "im")),
        ("", asked(QUESTION, said("assistant", "A", thinking="Why"), QUESTION, ANSWER), ["messages[1].thinking"]),
        (OPENS, asked(QUESTION, said("assistant", "A", thinking="Why"), QUESTION, ANSWER), []),
        (
            FIRST_CALL,
            asked(QUESTION, said("assistant", "", tool_calls=BOOKED), tools=[BOOK]),
            ["messages[1].tool_calls[1].name", "messages[1].tool_calls[1].arguments"],
        ),
        (WITH_TOOLS, asked(QUESTION, said("assistant", "", tool_calls=BOOKED), tools=[BOOK]), []),
        (AFTER_THOUGHTS, asked(QUESTION, said("assistant", THOUGHT)), []),
        *(  # said before the thoughts: neither in the last answer nor in an earlier one may it be left out
            (template, asked(QUESTION, said("assistant", "Hm. <think>Why</think> A"), *rest), missing)
            for template, missing in (("", []), (AFTER_THOUGHTS, ["messages[1].content"]))
            for rest in ((), (QUESTION, ANSWER))
        ),
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
    assert unrendered(row, conversation(row, by), by) == missing


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
    assert "rows of which the chat template leaves out a part are dropped" in dropped.warnings()[0]
    kept = build_rows(tmp_path, records, model=base, on_unrendered="keep")
    assert (len(kept.every()), kept.result.metrics["unrendered"]) == (2, 0)
    assert any("1 of 2 rows are kept although" in warning for warning in kept.warnings())

    request, events = request_for(tmp_path / "sft", base, kept.every()), Events(tmp_path / "events.jsonl")
    stage = request.stage()
    assert isinstance(stage, SftStage)
    with pytest.raises(StageFailed, match=r"leaves out messages\[0\]\.content of row [0-9a-f]+\n"):
        sft.tokenized(request, stage, words(SPEAKERS), "train", events)
    assert len(sft.tokenized(request, stage.model_copy(update={"on_unrendered": "keep"}), words(SPEAKERS), "train", events)[1]) == 2
    assert len(sft.tokenized(request, stage.model_copy(update={"on_unrendered": "drop"}), words(SPEAKERS), "train", events)[1]) == 1
    assert "1 of 2 rows are dropped, the first because the chat template" in warnings_of(tmp_path)[0]


def warnings_of(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["message"] for line in lines if line["type"] == "warning"]


PLAY = {"type": "function", "function": {"name": "play", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("template", "row", "missing"),
    [
        (SPEAKERS, asked(SYSTEM, QUESTION, ANSWER), "messages[0].content"),
        (SPEAKERS, asked(SYSTEM, QUESTION), "messages[0].content"),
        ("", asked(QUESTION, ANSWER, tools=[PLAY]), "tools[0]"),
        ("", asked(said("user", "play"), ANSWER, tools=[PLAY]), "tools[0]"),  # named by the question alone
        ("", asked(QUESTION, said("assistant", "", tool_calls=[CALL]), said("tool", "T"), ANSWER), "messages[1].tool_calls[0].name"),
        ("", asked(QUESTION, said("assistant", "Well", tool_calls=[CALL])), "messages[1].tool_calls[0].name"),
        ("", asked(QUESTION, ANSWER | {"reasoning_content": "Why"}), None),  # thoughts are not compared
    ],
)
def test_evaluate_and_grpo_refuse_rows_of_which_something_is_left_out(tmp_path: Path, template: str, row: Row, missing: str | None) -> None:
    row = row if row.messages[-1]["role"] == "assistant" else replace(row, answer="A")  # type: ignore[index]
    by = words(template)
    by.save_pretrained(tmp_path / "base")
    rows = [replace(row, id="r"), replace(asked(said("user", "Other?"), ANSWER), id="other")]
    data, test = dataset(tmp_path / "data", rows), dataset(tmp_path / "test", [])
    write_rows(rows, test.path / "test.parquet")
    events = Events(tmp_path / "events.jsonl")
    config = {"kind": "evaluate", "model": "base", "datasets": ["data"]}
    asks = lambda **fields: evaluation.test_rows(test, EvaluateStage(**config, **fields), "data", by, events)  # noqa: E731
    inputs = {"model": Input(path=tmp_path / "base", digest="b" * 64, type="Model"), "dataset": data}
    trains = make_request(tmp_path / "grpo", {**GRPO, "max_steps": 1}, inputs)
    if missing is None:
        assert [one.answer for one in asks()] == ["A", "A"]
        return
    for program in (asks, lambda: run_program(trains)):
        with pytest.raises(StageFailed, match=rf"the chat template .sha256 \w+. leaves out {re.escape(missing)}") as failure:
            program()
        assert (failure.value.failure_class, "of row r" in failure.value.message) == ("data", True)
        assert "on_unrendered" in failure.value.hint
    assert len(asks(on_unrendered="keep")) == 2
    assert [one.id for one in asks(on_unrendered="drop")] == ["other"]
    assert "1 of 2 rows are dropped" in warnings_of(tmp_path)[0]


def test_an_answer_that_is_not_rendered_is_not_rewarded(tmp_path: Path) -> None:
    """With `keep` nothing is compared: silence would be right for ever."""
    words().save_pretrained(tmp_path / "base")
    rows = [
        asked(QUESTION, said("assistant", "", tool_calls=[CALL])),
        asked(said("user", "R"), ANSWER, said("user", "S"), ANSWER | {"weight": 0}),
    ]
    inputs = {"model": Input(path=tmp_path / "base", digest="b" * 64, type="Model")}
    for number, row in enumerate(rows):
        inputs["dataset"] = dataset(tmp_path / f"data{number}", [replace(row, id="r")])
        request = make_request(tmp_path / f"grpo{number}", {**GRPO, "on_unrendered": "keep"}, inputs)
        last = len(row.messages or ()) - 1
        with pytest.raises(
            StageFailed, match=rf"1 of 1 rows have no answer that a model would learn to write \(messages\[{last}\] .*, the first r"
        ):
            run_program(request)


def test_an_answer_of_weight_0_is_left_out_where_it_alone_would_be_trained(tmp_path: Path) -> None:
    base = Input(path=tmp_path, digest="0" * 64, type="Model")
    silent = asked(QUESTION, ANSWER, said("user", "R"), ANSWER | {"weight": 0})
    one = replace(asked(QUESTION, ANSWER), id="one")
    events = Events(tmp_path / "events.jsonl")

    def tokenized(name: str, rows: list[Row], **fields: Any) -> list[str]:
        request = request_for(tmp_path / name, base, rows, **fields)
        stage = request.stage()
        assert isinstance(stage, SftStage)
        return sft.tokenized(request, stage, words(), "train", events)[1]

    assert tokenized("some", [silent, one], train_on="completion") == ["one"]
    assert warnings_of(tmp_path) == [
        "1 of 2 train rows end with an answer of weight 0, for example row r: with `train_on: completion` they are left out"
    ]
    assert tokenized("earlier", [silent, one], train_on="assistant") == ["r", "one"]
    with pytest.raises(StageFailed, match="1 of 1 train rows end with an answer of weight 0") as failure:
        tokenized("all", [silent], train_on="completion")
    assert "train_on: assistant" in failure.value.hint


def test_calls_and_schemas_are_written_in_the_files_order(tmp_path: Path) -> None:
    write_rows([CALLED], tmp_path / "rows.parquet")
    (read,) = read_rows(tmp_path / "rows.parquet")
    by = words(WITH_TOOLS)
    assert conversation(read, by) == conversation(CALLED, by)
    assert '{"zone": "Oslo", "at": "7:30"}' in conversation(read, by)
