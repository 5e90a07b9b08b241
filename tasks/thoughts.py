"""What an answer says, apart from what the model thought before it.

How a model marks its thoughts is seen in what its chat template writes of a made-up answer: a block (`<think>`), a channel
(`<|channel|>analysis`), or a block that the generation prompt has opened. Marks that rows write into contents by themselves, and
templates know nothing of, are in `tasks.scoring`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks import scoring, special_tokens
from tasks.rendering import ANSWER, QUESTION, TOOLS, made_up_calls, turn
from tasks.rows import Row
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = "Zthought"
LAST_MARK = re.compile(r"[<\[][^<>\[\]]*[>\]]\s*\Z")


@dataclass(frozen=True)
class Marks:
    """What a template writes around thoughts. Where it shows none, all are empty."""

    start: str = ""
    end: str = ""
    opened: bool = False
    """The generation prompt ends with the start."""
    lead: str = ""
    """What it writes before an answer that follows no thoughts, as the name of a channel."""


def written(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, ends: Container[int]) -> str:
    """The text of an answer's tokens, without its end, but with the special tokens that may mark thoughts."""
    return str(tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=False))


def said(answer: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model said in an answer, as it is `written` after its prompt: without thoughts, special tokens and space around it.
    Nothing where it was cut off while it was thinking."""
    found = marks(tokenizer)
    if found.opened and prompt.rstrip().endswith(found.start):
        answer = found.start + answer
    while found.start and answer.lstrip().startswith(found.start):
        _, closed, answer = answer.partition(found.end)
        if not closed:
            return ""
    if found.lead:
        answer = answer.rpartition(found.lead)[2]
    special = _special(tokenizer)
    answer = scoring.said(answer)  # before special tokens go: they may mark thoughts, too
    return (special.sub("", answer) if special else answer).strip()


def marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    return _marks(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template is not None else Marks()


@lru_cache(maxsize=8)
def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> Marks:
    for answer in ({"content": ANSWER}, {"content": "", "tool_calls": made_up_calls(1)}):  # some show thoughts before calls alone
        _, plain = _tried(answer, tokenizer)
        prompt, thoughtful = _tried(answer | {"reasoning_content": THOUGHT}, tokenizer)
        before, there, after = thoughtful.partition(THOUGHT)
        if not there or ANSWER in before:
            continue
        opened = not before.strip()
        start = LAST_MARK.search(prompt) if opened else None
        lead = ""
        if after != plain and after.endswith(plain):
            end, lead = after.removesuffix(plain), plain.partition(ANSWER)[0] if ANSWER in plain else ""
        else:
            end = after.partition(ANSWER)[0] if ANSWER in after else ""
        found = Marks((start.group() if start else before).strip(), end.strip(), opened, lead.strip())
        if found.start and found.end:
            return found
    return Marks()


def _tried(answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt of a made-up answer and its text; nothing where the template refuses it."""
    messages = ({"role": "user", "content": QUESTION}, {"role": "assistant", **answer})
    try:
        made_up = turn(Row("", messages=messages, extra={"tools": TOOLS} if "tool_calls" in answer else {}), 1, tokenizer)
    except StageFailed:
        return "", ""
    return made_up.prompt, made_up.answer


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    return special_tokens.pattern(tokenizer)
