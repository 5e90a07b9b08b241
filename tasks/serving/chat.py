"""Answers questions of `tuneline chat`: `python -m tasks.serving.chat REQUEST DESCRIPTOR`, in the runtime of the model's evaluation.

Lines of JSON come in by the descriptor, and others go out by stdout:

{"ask": {"messages": [...]}, "settings": {...}}    answer a conversation
{"ask": {"row": "7"}, "settings": {...}}           answer a row of the dataset's test split, by its position from 0 or its id
{"stop": true}                                     end the current answer

{"type": "ready", "seconds": 2.1, "template": true}
{"type": "question", "messages": [...], "reference": "..."}                of a row, before its answer
{"type": "text", "text": "...", "thoughts": false}
{"type": "answer", ...}                                                    the fields of `Answer`
{"type": "failed", "class": "data", "message": "...", "hint": "..."}       in place of an answer, or of `ready`

Ends when the descriptor is closed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.data.rows import Row, read_split
from tasks.log_filters import silence
from tasks.models.loading import check_device, check_inputs
from tasks.packages import hide
from tasks.serving.lines import failed, own_stdout
from tuneline.errors import StageFailed
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.workspace.protocol import Request
from tuneline.workspace.sampling import Sampling


def main() -> int:
    out = own_stdout()

    def say(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    request = Request.read(Path(sys.argv[1]))
    silence()
    began = time.monotonic()
    try:
        check_inputs(request)
        hide(request)
        chat = Chat(request)
    except Exception as error:
        say(**failed(error))
        return 1
    say(type="ready", seconds=round(time.monotonic() - began, 1), template=chat.writer.tokenizer.chat_template is not None)
    for wanted in lines(int(sys.argv[2]), chat):
        try:
            chat.answer(wanted["ask"], wanted["settings"], say)
        except Exception as error:
            say(**failed(error))
    return 0


class Chat:
    def __init__(self, request: Request):
        from tasks.data.rendering import form
        from tasks.data.thoughts import marks
        from tasks.serving.answers import Writer

        stage = request.stage()
        assert isinstance(stage, EvaluateStage)
        check_device(stage)
        self.request, self.writer = request, Writer(request)
        if self.writer.tokenizer.chat_template is not None:  # found once, before the first question
            form(self.writer.tokenizer)
            marks(self.writer.tokenizer)

    @cached_property
    def rows(self) -> list[Row]:
        return read_split(self.request.inputs["dataset"].path, "test")

    def answer(self, asked: dict[str, Any], settings: dict[str, Any], say: Any) -> None:
        if "row" in asked:
            row = self.row(asked["row"])
            say(type="question", messages=question(row), reference=row.answer)
        else:
            row = self.conversation(asked["messages"])
        answer = self.writer.write(row, Sampling(**settings), lambda text, thoughts: say(type="text", text=text, thoughts=thoughts))
        say(type="answer", **asdict(answer))

    def conversation(self, messages: list[dict[str, Any]]) -> Row:
        from tasks.data.special_tokens import first, pattern

        row = Row("chat", messages=tuple(messages), id="chat")
        if (special := pattern(self.writer.tokenizer)) and (found := first(row, special)):
            raise StageFailed("data", f"found the special token {found} in the question", "write it apart, as with a space in it")
        if self.writer.tokenizer.chat_template is not None:
            return row
        return Row("chat", prompt=messages[-1]["content"], id="chat")  # continues a text: it has learned no conversations

    def row(self, wanted: str) -> Row:
        """Return a row with the reference that an evaluation compares with. Raises StageFailed(data) if there is no such row."""
        from tasks.data import special_tokens
        from tasks.data.masks import with_reference

        by_id = {row.id: row for row in self.rows}
        row = by_id.get(wanted) or (self.rows[int(wanted)] if wanted.isdecimal() and int(wanted) < len(self.rows) else None)
        if row is None:
            found = f"found row {wanted}, expected 0 to {len(self.rows) - 1}, or the id of a row of the test split"
            raise StageFailed("data", found, "samples.jsonl of an evaluation has the ids")
        if row.text is not None:
            raise StageFailed("data", f"row {wanted} is plain text, which asks nothing", "name a dataset of questions")
        special_tokens.refuse([row], self.writer.tokenizer)
        return with_reference(row, self.writer.tokenizer)


def question(row: Row) -> list[dict[str, Any]]:
    """Return what the row asks, as messages."""
    return [*(row.prompt_messages() or ({"role": "user", "content": row.prompt or ""},))]


def lines(descriptor: int, chat: Chat) -> Any:
    """Yield questions as they are asked. A thread reads on, so that an answer can be stopped."""
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        with os.fdopen(descriptor, encoding="utf-8") as file:
            for line in file:
                document = json.loads(line)
                if "stop" in document:
                    chat.writer.stopped.set()
                else:
                    chat.writer.stopped.clear()
                    asked.put(document)
        os._exit(0)  # nobody is left to ask; an answer may be in progress

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield asked.get()


if __name__ == "__main__":
    sys.exit(main())
