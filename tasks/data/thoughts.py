"""Extracts what an answer says, without the thoughts before it.

The marks around thoughts are found in what the chat template writes for an artificial answer: a block (`<think>`), a channel
(`<|channel|>analysis`), or a block that the generation prompt has opened. `tasks.data.marks` knows the marks that rows contain
without their template.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.data import special_tokens
from tasks.data.marks import END, START
from tasks.data.marks import said as said_plainly
from tasks.data.rendering import ANSWER, QUESTION, TOOLS, made_up_calls, turn
from tasks.data.rows import Row
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = "Zthought"
ENDED, BEGUN = re.compile(END), re.compile(rf"\s*(?:{START})")
LAST_MARK = re.compile(r"[<\[][^<>\[\]]*[>\]]\s*\Z")


@dataclass(frozen=True)
class Marks:
    """The text that a template writes around thoughts. All fields are empty if it writes no thoughts."""

    start: str = ""
    end: str = ""
    opened: bool = False
    """The generation prompt ends with the start."""
    leads: tuple[str, ...] = ()
    """Text that may come before an answer, such as the name of a channel, or of the role if the template has no generation prompt."""


def written(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, ends: Container[int]) -> str:
    """Decode an answer's tokens, without its end, but with the special tokens that may mark thoughts."""
    return str(tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=False))


def said(answer: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the model said in an answer (`written` after its prompt): without thoughts, special tokens and surrounding space.
    Empty if it was cut off within its thoughts."""
    answer = said_plainly(after_thoughts(answer, prompt, tokenizer))  # before special tokens are removed: they may mark thoughts, too
    return without_special(answer, tokenizer).strip()


def spoken(answer: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an answer as lm-eval's tasks compare it: without special tokens and thoughts, and else unchanged, with leading space."""
    rest = after_thoughts(answer, prompt, tokenizer)
    return without_special(rest if rest == answer else rest.lstrip(), tokenizer)


def until(answer: str, stops: Iterable[str], prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Cut an answer at stop texts, which do not end thoughts: what precedes the answer's first words is searched only if the model does
    not think."""
    rest = after_thoughts(answer, prompt, tokenizer)
    if rest != answer or marks(tokenizer).start:
        rest = rest.lstrip()
    return answer[: len(answer) - len(rest)] + cut(rest, stops)


def after_thoughts(answer: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of an answer that follows its thoughts: all of it if it has none, nothing if they have not ended."""
    found = marks(tokenizer)
    if found.opened and prompt.rstrip().endswith(found.start):
        answer = found.start + answer
    while mark := next((mark for mark in (found.start, *found.leads) if mark and answer.lstrip().startswith(mark)), None):
        answer = answer.partition(found.end if mark == found.start else mark)[2]
    *_, answer = ENDED.split(answer)
    return "" if BEGUN.match(answer) else answer


def cut(text: str, stops: Iterable[str]) -> str:
    """Cut a text at each of the stop texts in turn, as lm-eval does."""
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text


def without_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    special = _special(tokenizer)
    return special.sub("", text) if special else text


def marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    return _marks(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template is not None else Marks()


@lru_cache(maxsize=8)
def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> Marks:
    question: dict[str, Any] = {"role": "user", "content": QUESTION}
    answer: dict[str, Any] = {"role": "assistant", "content": ANSWER}
    (call,) = calls = made_up_calls(1)
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "content": QUESTION, "tool_call_id": call["id"]}
    found = _thoughts([question, answer], tokenizer) or _thoughts([question, called], tokenizer)  # some only show them before calls
    start, end, opened = found or ("", "", False)
    before = [_tried(each, tokenizer)[1].partition(ANSWER) for each in ([question, answer], [question, called, result, answer])]
    leads = dict.fromkeys(lead.strip() for lead, there, _ in before if there and not (start and (start in lead or end in lead)))
    return Marks(start, end, opened, tuple(lead for lead in leads if lead))


def _thoughts(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, bool] | None:
    """Return the text before and after the thoughts of an artificial answer, and whether the prompt ends with the former."""
    plain = _tried(messages, tokenizer)[1]
    prompt, thoughtful = _tried([*messages[:-1], messages[-1] | {"reasoning_content": THOUGHT}], tokenizer)
    before, there, after = thoughtful.partition(THOUGHT)
    if not there or ANSWER in before:
        return None
    opened = not before.strip()
    mark = LAST_MARK.search(prompt) if opened else None
    start = (mark.group() if mark else before).strip()
    end = (after.removesuffix(plain) if after != plain and after.endswith(plain) else after.rpartition(ANSWER)[0]).strip()
    return (start, end, opened) if start and end else None


def _tried(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the prompt of an artificial answer and its text; empty if the template refuses it."""
    tools = {"tools": TOOLS} if any("tool_calls" in message for message in messages) else {}
    try:
        last = turn(Row("", messages=tuple(messages), extra=tools), len(messages) - 1, tokenizer)
    except StageFailed:
        return "", ""
    return last.prompt, last.answer


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    return special_tokens.pattern(tokenizer)
