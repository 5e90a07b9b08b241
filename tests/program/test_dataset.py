"""Program `dataset`: duplicates, splits, lengths, report, and the same bytes everywhere. Needs the torch runtime.

What sources give is in program/test_dataset_sources.py, what is refused in program/test_dataset_refused.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import ASSISTANT, GYM, SYSTEM, TOOL, USER, build, build_rows, sums, write_file
from hypothesis import given
from hypothesis import strategies as st
from pico import save_pico
from program_tools import make_request, payload_digest, run_process, run_program

from tasks.dataset import bucket, identified, split
from tasks.masks import prompt_ids, token_counts, tokenize
from tasks.rows import SPLITS, Row, content_hash
from tasks.sources import Item
from tuneline.errors import StageFailed
from tuneline.protocol import Input
from tuneline.spec import Split


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
        config["on_unrendered"] = "keep"  # the template knows no tools
        files = {"sources.1.path": [folder / f"{name}.jsonl"]}
        requests.append(make_request(folder / "run", config, {"model": pico}, files=files))
    run_program(requests[0])
    done = run_process(requests[1])
    assert done.returncode == 0, done.stderr
    assert payload_digest(requests[0]) == payload_digest(requests[1])
    assert sorted(path.name for path in requests[0].payload.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    assert b"one.jsonl" not in b"".join(path.read_bytes() for path in requests[0].payload.iterdir())
