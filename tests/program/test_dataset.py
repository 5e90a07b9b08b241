"""Program `dataset`: duplicates, splits, lengths, report, and the same bytes everywhere. Needs the torch runtime.

What sources give is in program/test_dataset_sources.py, what is refused in program/test_dataset_refused.py.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import ASSISTANT, GYM, SYSTEM, TOOL, USER, build, build_rows, sums, write_file
from elsewhere import Elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import save_pico
from program_tools import make_request, payload_digest, run_program

from tasks.data import special_tokens
from tasks.data.dataset import bucket, identified, split
from tasks.data.masks import prompt_ids, token_counts, tokenize
from tasks.data.rows import SPLITS, Row, content_hash
from tasks.data.sources import Item
from tuneline.errors import StageFailed
from tuneline.kinds.dataset import Split
from tuneline.workspace.protocol import Input


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Input:
    return Input(path=save_pico(tmp_path_factory.mktemp("pico") / "model"), digest="0" * 64, type="Model")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from pico import tokenizer

    return tokenizer()


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


def two(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"prompt": "Give a divisor of 4."} | first, {"prompt": "Give a divisor of 4."} | second]


@pytest.mark.parametrize(
    ("records", "kept"),
    [
        (two({"answer": "1"}, {"answer": "2"}), 2),
        (two({"answer": "1"}, {"answer": 1}), 1),
        (two({"answer": "café"}, {"answer": "cafe\u0301"}), 1),
        (two({"tests": "assert a"}, {"tests": "assert b"}), 2),
        (two({"extra": {"level": 1}}, {"extra": {"level": 2}}), 2),
        (two({"extra": {"a": 1, "b": 2}}, {"extra": {"b": 2, "a": 1}}), 1),
        (two({"completion": "2"}, {"completion": "2", "answer": "2"}), 1),
        (two({"completion": "2"}, {"completion": "2", "answer": "4"}), 2),
        ([{"messages": [USER, ASSISTANT], "tools": [TOOL | {"x": i}]} for i in range(2)], 2),
        ([{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT | {"reasoning_content": "Well."}]}], 2),
        ([{"text": text} for text in ("\u00c5ngstr\u00f6m", "\u212bngstro\u0308m", "A\u030angstr\u00f6m")], 1),
        ([{"prompt": text, "completion": "\uac00"} for text in ("\ud55c", "\u1112\u1161\u11ab")], 1),
    ],
)
def test_identity_is_all_that_is_said_and_asked(tmp_path: Path, records: list[Any], kept: int) -> None:
    run = build_rows(tmp_path, records)
    assert (len(run.rows()), run.result.metrics["duplicates"]) == (kept, len(records) - kept)
    assert len({row.group for row in run.rows()}) == 1


def test_what_counts_as_a_duplicate_is_a_field(tmp_path: Path) -> None:
    records = [{"prompt": f"{i % 3}?", "answer": str(i % 6)} for i in range(12)]
    answers = {by: [row.answer for row in build_rows(tmp_path, records, dedup=by).rows()] for by in ("content", "prompt", "none")}
    assert answers == {"content": list("012345"), "prompt": list("012"), "none": list("012345") * 2}
    warned = build_rows(tmp_path, records, dedup="prompt").warnings()
    assert warned[0].startswith("3 prompts have different answers, the first at ")


def test_forms_of_unicode_are_one_question_for_the_split(tmp_path: Path) -> None:
    forms = [form(f"Où est le café n° {i} ?") for i in range(30) for form in (str, lambda text: unicodedata.normalize("NFD", text))]
    run = build_rows(tmp_path, [{"prompt": text, "completion": str(i)} for i, text in enumerate(forms)], split={"test": 0.3})
    questions = {name: {unicodedata.normalize("NFC", row.prompt or "") for row in run.rows(name)} for name in ("train", "test")}
    assert len(run.every()) == 60
    assert questions["test"]
    assert not questions["test"] & questions["train"]


# --- special tokens, and what the template refuses ------------------------------------------------------------------

END = "<|im_end|>"
TOKENS_IN_TEXT: list[dict[str, Any]] = [
    {"messages": [USER | {"content": f"a{END}"}, ASSISTANT]},
    {"messages": [SYSTEM | {"content": f"{END}<|im_start|>"}, USER, ASSISTANT]},
    {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {f"{END}": [END]}}]},
            {"role": "tool", "content": "b"},
            ASSISTANT,
        ]
    },
    {"messages": [USER, ASSISTANT | {"content": "<|im_end<|im_end|>|>"}], "tools": [TOOL | {"description": END}]},
    {"messages": [USER, ASSISTANT | {"reasoning_content": END}]},
    {"messages": [USER, ASSISTANT], "system": END},
]


def test_special_tokens_written_out_are_no_tokens(tmp_path: Path, pico: Input, tokenizer: Any) -> None:
    good = {"messages": [USER, ASSISTANT | {"content": "<b> < | im_end | > </s>"}]}
    for i, record in enumerate([*TOKENS_IN_TEXT, {"text": f"a{END}"}, {"prompt": END, "completion": "b"}, {"prompt": "a", "answer": "b"}]):
        (tmp_path / f"{i}.jsonl").write_text(
            json.dumps(good) + "\n" + json.dumps(record) + "\n" if "messages" in record else json.dumps(record)
        )
    sources = [{"type": "files", "path": f"{i}.jsonl"} for i in range(9)]
    with pytest.raises(StageFailed, match=r"0\.jsonl:2: found the special token <\|im_end\|> written out in the text") as failure:
        build(tmp_path, sources, pico)
    assert (failure.value.failure_class, "`escape`" in failure.value.hint) == ("data", True)
    dropped = build(tmp_path, [source | {"on_bad_row": "drop"} for source in sources], pico, dedup="none")
    assert (dropped.result.metrics["bad_rows"], len(dropped.rows())) == (8, 7)
    escaped = build(tmp_path, sources, pico, special_tokens="escape", dedup="none", on_unrendered="keep").rows()
    assert len(escaped) == 15
    special_tokens.refuse(escaped, tokenizer)
    assert [row.messages[0]["content"] for row in escaped if row.messages][1] == "a< |im_end|>"
    kept = build(tmp_path, sources, pico, special_tokens="keep", dedup="none", on_unrendered="keep").rows()
    assert sum("special_tokens" in row.extra for row in kept) == 8
    special_tokens.refuse(kept, tokenizer)
    unknown = build(tmp_path, sources, dedup="none").rows()
    with pytest.raises(StageFailed, match=r"row \w+: found the special token <\|im_end\|> written out in the text"):
        special_tokens.refuse(unknown, tokenizer)


@pytest.mark.parametrize(
    "raising",
    [
        "raise_exception('no')",
        "message.content + 1",
        "message.nothing.at_all",
        "message.content[0](1)",
        "[][3].x",
        "'%d' % message.content",
    ],
)
def test_whatever_a_template_raises_names_the_row_or_drops_it(tmp_path: Path, pico: Input, raising: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in pico.path.iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").unlink()
    body = "{% if message.content == 'bad' %}{{ " + raising + " }}{% endif %}{{ message.content }}"
    (model / "chat_template.jinja").write_text("{% for message in messages %}" + body + "{% endfor %}")
    records = [{"messages": [USER, ASSISTANT | {"content": content}]} for content in ("a", "bad", "c")]
    changed = pico.model_copy(update={"path": model})
    with pytest.raises(StageFailed, match=r"data\.jsonl:2: the chat template refuses row \w+: ") as failure:
        build_rows(tmp_path, records, model=changed)
    assert failure.value.failure_class == "data"
    run = build_rows(tmp_path, records, {"on_bad_row": "drop"}, model=changed)
    assert [row.messages[1]["content"] for row in run.rows() if row.messages] == ["a", "c"]
    assert (run.result.metrics["bad_rows"], run.result.metrics["rows_read"]) == (1, 3)


def test_answers_of_weight_0_are_not_trained_on(tokenizer: Any) -> None:
    turns = (USER, ASSISTANT | {"content": "five", "weight": 0}, USER, ASSISTANT | {"content": "four"})
    row, plain = Row("s", messages=turns), Row("s", messages=tuple({k: v for k, v in turn.items() if k != "weight"} for turn in turns))
    for train_on, said in (("assistant", "four"), ("completion", "four"), ("all", "four")):
        tokens = tokenize(row, tokenizer, train_on)
        trained = tokenizer.decode([token for token, on in zip(tokens.input_ids, tokens.trained, strict=True) if on])
        assert tokens.input_ids == tokenize(plain, tokenizer, train_on).input_ids
        assert said in trained
        assert "five" not in trained
    assert "five" in tokenizer.decode([t for t, on in zip(*vars(tokenize(plain, tokenizer)).values(), strict=True) if on])


def test_rows_with_one_prompt_stay_together(tmp_path: Path) -> None:
    records = [{"prompt": f"{i % 40}?", "completion": str(i)} for i in range(200)]
    run = build_rows(tmp_path, records, split={"validation": 0.2, "test": 0.2})
    groups = {name: {row.group for row in run.rows(name)} for name in SPLITS}
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 40
    assert run.result.metrics["rows_train"] + run.result.metrics["rows_validation"] + run.result.metrics["rows_test"] == 200
    assert any("40 prompts have different answers, the first at " in warning for warning in run.warnings())
    assert [int(row.completion or "") for row in run.rows()] == sorted(int(row.completion or "") for row in run.rows())


prompts = st.lists(st.integers(0, 50), max_size=40)


def items_of(numbers: list[int]) -> list[Item]:
    return [Item(f"row {i}", identified(Row("sources.0", prompt=f"{number}?", completion=str(i)))) for i, number in enumerate(numbers)]


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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
        Row("s", text="already ends<|im_end|>"),
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
        ("truncate", r"data\.jsonl:2: found a row of \d+ tokens, expected 60: only plain text can be truncated"),
        ("error", r"data\.jsonl:2: found a row of \d+ tokens, expected 60\n"),
    ],
)
def test_over_long_conversations_are_refused(tmp_path: Path, pico: Input, over_long: str, message: str) -> None:
    records = [{"messages": [USER, {"role": "assistant", "content": "word " * count}]} for count in (1, 100)]
    with pytest.raises(StageFailed, match=message) as failure:
        build_rows(tmp_path, records, model=pico, max_length=60, over_long=over_long)
    assert "over_long: drop" in failure.value.hint


def test_an_earlier_answer_that_a_training_would_not_find_is_named(tmp_path: Path, pico: Input) -> None:
    """R is asked by one text, and stands before its answer as another; all of the conversation is rendered."""
    model = tmp_path / "strange"
    shutil.copytree(pico.path, model)
    turn = "<|im_start|>{{ message.role }}\n{{ message.content | replace('R', 'R' ~ (messages | length)) }}<|im_end|>\n"
    ask = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    (model / "chat_template.jinja").write_text("{% for message in messages %}" + turn + "{% endfor %}" + ask)
    conversations = [[question, "A", "Q", "A"] for question in ("Q1", "R", "Q2")]
    records = [
        {"messages": [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=True)]}
        for contents in conversations
    ]
    strange = Input(path=model, digest="0" * 64, type="Model")
    with pytest.raises(StageFailed, match=r"data\.jsonl:2: the chat template renders row \w+ so that the text before message 1 changes"):
        build_rows(tmp_path, records, model=strange)
    dropped = build_rows(tmp_path, records, {"on_bad_row": "drop"}, model=strange)
    assert (len(dropped.every()), dropped.result.metrics["bad_rows"]) == (2, 1)


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
    assert run.warnings() == ["columns and parts of messages are not read: messages.weight (1)"]


def test_a_split_of_few_rows_is_warned_of(tmp_path: Path) -> None:
    run = build_rows(tmp_path, sums(40), split={"test": 0.1, "validation": 0.5})
    assert 0 < len(run.rows("test")) < 10 <= len(run.rows("validation"))
    assert run.warnings() == [
        f"the test split has {len(run.rows('test'))} of 40 rows: too few for reliable figures; add rows, or raise split.test"
    ]


# --- determinism ------------------------------------------------------------------------------------------------------


def test_same_bytes_in_another_folder_process_and_hash_seed(tmp_path: Path, pico: Input, elsewhere: Elsewhere) -> None:
    requests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write_file(
            folder / f"{name}.jsonl", [{"messages": [USER, {"role": "assistant", "content": str(i)}], "tools": [TOOL]} for i in range(9)]
        )
        config = {"kind": "dataset", "model": "base", "sources": [GYM, {"type": "files", "path": "*.jsonl"}], "split": {"test": 0.3}}
        config["on_unrendered"] = "keep"  # the template knows no tools
        files = {"sources.1.path": [folder / f"{name}.jsonl"]}
        requests.append(make_request(folder / "run", config, {"model": pico}, files=files))
    run_program(requests[0])
    elsewhere.run(requests[1])
    assert payload_digest(requests[0]) == payload_digest(requests[1])
    assert sorted(path.name for path in requests[0].payload.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    assert b"one.jsonl" not in b"".join(path.read_bytes() for path in requests[0].payload.iterdir())
