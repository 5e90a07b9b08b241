"""Answers of `tuneline chat`: those of an evaluation, piece by piece, with stop texts, thoughts and interruptions."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluate_tools import CHATS, request_for, samples, save_adapter
from pico import save_pico, tokenizer
from program_tools import run_program
from template_tools import THINKS_LAST

from tasks.data.rendering import ends
from tasks.data.rows import Row
from tasks.serving.answers import Answer, Writer, _Progress
from tasks.serving.chat import Chat
from tasks.serving.server import SERVED, arguments
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request
from tuneline.workspace.sampling import Sampling

ROWS = [*CHATS, Row("s", prompt="one two three", completion=" four", id="plain")]


@pytest.fixture(scope="module", params=["model", "adapter"])
def evaluated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Input) -> Request:
    """An evaluation's request, after it has run: also of an adapter that changes answers."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_adapter(base, folder / "adapter") if request.param == "adapter" else base
    made = request_for(folder, source, ROWS, max_new_tokens=8)
    run_program(made)
    return made.model_copy(update={"inputs": {"model": source, "dataset": made.inputs["datasets.0"]}})


@pytest.fixture(scope="module")
def chat(evaluated: Request) -> Chat:
    return Chat(evaluated)


def ask(chat: Chat, asked: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the answer, and what was said before it."""
    said: list[dict[str, Any]] = []
    chat.answer(asked, {"max_new_tokens": 8, **settings}, lambda **fields: said.append(fields))
    return said.pop(), said


def test_greedy_answers_equal_the_evaluations(chat: Chat, evaluated: Request) -> None:
    expected = {sample["id"]: sample for sample in samples(evaluated)}
    for place, row in enumerate(ROWS):
        answer, (question, *pieces) = ask(chat, {"row": row.id})
        assert answer["answer"] == expected[row.id]["answer"]
        assert question["reference"] == expected[row.id]["reference"]
        assert question["messages"][-1]["content"] == (row.messages[0]["content"] if row.messages else row.prompt)
        assert "".join(piece["text"] for piece in pieces).strip() == answer["said"]
        assert ask(chat, {"row": str(place)})[0]["answer"] == answer["answer"]
    typed = ask(chat, {"messages": [dict(CHATS[0].messages[0])]})[0]  # type: ignore[index]
    assert typed["answer"] == expected["chat0"]["answer"]


def test_a_conversation_goes_on_and_sampling_has_its_seed(chat: Chat) -> None:
    asked = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]}
    answers = [ask(chat, asked, temperature=5, seed=seed)[0]["answer"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    more = {"messages": [*asked["messages"], {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "One?"}]}
    assert ask(chat, more)[0]["answer"] != ask(chat, asked)[0]["answer"]


def test_an_answer_ends_before_a_stop_text_which_is_never_shown(chat: Chat) -> None:
    whole = ask(chat, {"row": "0"})[0]["answer"]
    stop = whole[len(whole) // 2 :][:3]
    answer, (_, *pieces) = ask(chat, {"row": "0"}, stop=[stop])
    assert answer["answer"] == whole.partition(stop)[0]
    assert "".join(piece["text"] for piece in pieces).strip() == answer["said"]
    assert answer["ended"] == "stop"


def test_an_answer_is_interrupted_and_the_next_one_is_not(chat: Chat) -> None:
    said: list[Any] = []

    def say(**fields: Any) -> None:
        said.append(fields)
        if fields["type"] == "text":
            chat.writer.stopped.set()

    chat.answer({"row": "0"}, {"max_new_tokens": 8}, say)
    assert said[-1]["ended"] == "interrupted"
    assert said[-1]["tokens"] < 8
    chat.writer.stopped.clear()  # as the thread does that reads the next question
    assert ask(chat, {"row": "0"})[0]["tokens"] > said[-1]["tokens"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"row": "99"}, "found row 99, expected 0 to 7, or the id of a row of the test split"),
        ({"messages": [{"role": "user", "content": "one " * 3000}]}, r"found \d+ tokens before the answer, expected 1 to 2047"),
        ({"messages": [{"role": "user", "content": "a <|im_end|> b"}]}, r"found the special token <\|im_end\|> in the question"),
    ],
)
def test_what_cannot_be_answered_is_refused(chat: Chat, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(StageFailed, match=message):
        ask(chat, asked)


def test_thoughts_are_shown_apart_and_characters_whole() -> None:
    words = tokenizer()
    words.chat_template = THINKS_LAST
    writer: Any = SimpleNamespace(tokenizer=words, ends=set(ends(words)), stopped=threading.Event())
    shown: list[tuple[str, bool]] = []
    progress = _Progress(writer, "", 0, Sampling(stop=("END",)), lambda *piece: shown.append(piece))
    text = "<think>\nIs it 字?\n</think>\n\nIt is 字 E.\nEND more"
    ids = words(text, add_special_tokens=False)["input_ids"]
    done = [bool(progress(torch.tensor([ids[: i + 1]]), None)) for i in range(len(ids))]
    assert "".join(piece for piece, thoughts in shown if not thoughts).strip() == "It is 字 E."
    assert "Is it 字?" in "".join(piece for piece, thoughts in shown if thoughts)
    assert not any("\ufffd" in piece for piece, _ in shown)
    assert done.index(True) == len(words(text.partition(" more")[0], add_special_tokens=False)["input_ids"]) - 1


def test_a_model_without_a_template_continues_texts(tmp_path: Path, base: Input) -> None:
    source = base.model_copy(update={"path": save_pico(tmp_path / "model"), "template": None})
    (source.path / "chat_template.jinja").unlink()
    made = request_for(tmp_path, source, [ROWS[-1]])
    writer = Writer(made)
    answer = writer.write(Row("chat", prompt="one two three"), Sampling(max_new_tokens=4), lambda text, thoughts: None)
    assert isinstance(answer, Answer)
    assert answer.tokens == 4


def test_servers_get_what_was_trained_and_the_gpus_memory(tmp_path: Path, base: Input) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    made = request_for(tmp_path, base).model_copy(update={"inputs": {"p/base": base, "p/sft": adapter}})
    flags = arguments(made, ["0", "1"])
    served = made.work / SERVED
    assert {f"--tokenizer={served}", f"--generation-config={served}"} < set(flags)
    assert {"--tensor-parallel-size=2", "--gpu-memory-utilization=0.9", "--max-model-len=-1", "--max-lora-rank=8"} < set(flags)
    assert flags[flags.index("--served-model-name") + 1] == "p/base"
    assert json.loads(flags[-1]) == {"name": "p/sft", "path": str(adapter.path)}
    config = json.loads((served / "generation_config.json").read_bytes())
    assert set(config) == {"eos_token_id"}
    assert "<|im_end|>" in tokenizer().convert_ids_to_tokens(config["eos_token_id"])
    assert "--max-model-len=2048" in arguments(made, None)
