"""Finds what a row contains and its chat template leaves out: a model would be trained, or asked, without it.

Every stage that renders rows checks this. Missing parts are named by their field: `messages[0].content`, `tools[1]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.data.marks import TAGS, before_thoughts, said
from tasks.data.rendering import QUESTION, called, conversation, form, render_text, tried
from tasks.data.rows import THOUGHTS, Row
from tasks.models.loading import template_hash
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = 24  # characters
LONGEST_MARKUP = 40  # characters of a template's word that could be confused with a row's
HINT = "use a model whose template knows it, change the rows, or set `on_unrendered: drop` or `keep`"


def complete(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    on_unrendered: str,
    events: Events,
    lost: Callable[[Row, PreTrainedTokenizerBase], list[str]],
) -> list[Row]:
    """Return the rows without those that the stage drops because something is `lost`. Raises StageFailed(data) if that is an error."""
    if on_unrendered == "keep":
        return list(rows)
    kept, dropped = [], []
    for row in rows:
        if row.messages is None or not (missing := lost(row, tokenizer)):
            kept.append(row)
            continue
        message = f"the chat template (sha256 {str(template_hash(tokenizer))[:12]}) leaves out {', '.join(missing)} of row {row.id}"
        if on_unrendered == "error":
            raise StageFailed("data", message, HINT)
        dropped.append(message)
    if dropped and not kept:
        raise StageFailed("data", f"all {len(dropped)} rows are dropped, the first because {dropped[0]}", HINT)
    if dropped:
        events.warning(f"{len(dropped)} of {len(dropped) + len(kept)} rows are dropped, the first because {dropped[0]}")
    return kept


def lost_in_training(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    chosen, *rejected = row.alternatives()
    return [
        *unrendered(chosen, conversation(chosen, tokenizer), tokenizer),
        *(field for each in rejected for field in lost_in_rejected(each, conversation(each, tokenizer), tokenizer)),
    ]


def lost_in_rejected(row: Row, text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what is left out of the last answer of a row, the rejected one, under that name."""
    assert row.messages is not None
    last = f"messages[{len(row.messages) - 1}]."
    return [f"rejected.{field.removeprefix(last)}" for field in unrendered(row, text, tokenizer) if field.startswith(last)]


def lost_in_asking(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what is left out of the prompt, and of the answer if it is the reference; thoughts are not compared."""
    prompt = row.prompt_messages()
    assert row.messages is not None
    assert prompt is not None
    missing = unrendered(replace(row, messages=prompt), render_text(prompt, row, tokenizer, add_generation_prompt=True), tokenizer)
    if row.answer is None and len(prompt) < len(row.messages):
        answer = f"messages[{len(prompt)}]."
        missing += [field for field in lost_in_training(row, tokenizer) if field.startswith(answer)]
    return [field for field in missing if field.rpartition(".")[2] not in THOUGHTS]


def unrendered(row: Row, text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of a row that its rendered text does not contain, such as `messages[0].content`. Searches each message after
    the previous one, so that a short one is not found within another; a template may put a system prompt anywhere."""
    missing, position = [], 0
    assert row.messages is not None
    markup = skeleton(tuple(message["role"] for message in row.messages), tokenizer, str(tokenizer.chat_template))
    for number, message in enumerate(row.messages):
        where, content, last = f"messages[{number}]", message.get("content") or "", number == len(row.messages) - 1
        before = position  # a template may write calls and thoughts on either side of the content
        pieces = [content]
        if message["role"] == "assistant" and ("</" in content or "[/" in content or "<|" in content):
            # a template may write thoughts in its own way, and leave out those of earlier turns
            pieces = TAGS.split(content) if last else [before_thoughts(content), said(content)]
        spans, place = [], 0 if message["role"] == "system" else position
        for piece in map(str.strip, pieces):
            if place >= 0 and (hit := span(piece, text, place)) and not is_markup(piece, text, markup):
                spans.append(hit)
                place = hit[1]
            else:
                place = -1
        if place < 0:
            missing.append(f"{where}.content")
        elif message["role"] != "system":
            position = place
        thoughts = {name: message[name].strip() for name in THOUGHTS if name in message}
        if last:
            beside = without(text, spans) if thoughts else text  # a thought is not found within the answer
            missing += [
                f"{where}.{name}"
                for name, thought in thoughts.items()
                if found(thought, beside, before) < 0 or is_markup(thought, text, markup)
            ]
        elif not writes_thoughts(tokenizer, str(tokenizer.chat_template)):  # others leave out earlier ones, also in prompts
            missing += [f"{where}.{name}" for name, thought in thoughts.items() if thought]
        after = before
        for each, call in enumerate(message.get("tool_calls") or []):
            fields, after = lost_of_call(called(call, False), text, after, f"{where}.tool_calls[{each}]")
            missing += fields
        position = max(position, after)
    if tools := row.extra.get("tools"):
        prompt = row.messages[0]["content"] if row.messages[0]["role"] == "system" else ""
        missing += [
            f"tools[{number}]"
            for number, name in lost_tools(json.dumps(tools), tokenizer, str(tokenizer.chat_template))
            if found(name, prompt) < 0  # some rows list their tools there
        ]
    return missing


@lru_cache(maxsize=1000)  # most rows of a dataset have the same roles
def skeleton(roles: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return what the template itself writes for messages of these roles; empty if it refuses such a conversation."""
    messages = [{"role": role, "content": "\u2400"} for role in roles]  # a character that rows do not contain
    return tried(messages, None, tokenizer, form(tokenizer), False) or ""


def is_markup(piece: str, text: str, markup: str) -> bool:
    """Return whether every occurrence of the piece is one of the template's own words, such as the names of roles."""
    return bool(piece) and len(piece) <= LONGEST_MARKUP and piece in markup and text.count(piece) <= markup.count(piece)


@lru_cache(maxsize=100)
def writes_thoughts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether the template writes the thoughts of a last answer."""
    messages = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": "\u2400", "reasoning_content": "\u2401"})
    try:
        return "\u2401" in conversation(Row(source="probe", messages=messages), tokenizer)
    except StageFailed:
        return True


def without(text: str, spans: list[tuple[int, int]]) -> str:
    for start, end in spans:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


@lru_cache(maxsize=1000)  # most rows of a dataset have the same tools
def lost_tools(tools: str, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[tuple[int, str], ...]:
    """Return number and name of the tools whose name the template does not write beside a neutral question."""
    listed = json.loads(tools)
    text = tried([{"role": "user", "content": QUESTION}], listed, tokenizer, form(tokenizer), True)
    names = enumerate(map(name_of, listed)) if text else ()  # some templates refuse a single question
    return tuple((number, name) for number, name in names if found(name, text) < 0)


def name_of(of: Any) -> str:
    """Return the name of a tool or of a call."""
    function = of.get("function", of) if isinstance(of, dict) else None
    return str(function.get("name") or "") if isinstance(function, dict) else ""


def lost_of_call(call: Any, text: str, start: int, where: str) -> tuple[list[str], int]:
    """Return the fields of a call that the text lacks, and where the call ends there: the next one is searched after it."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments") if isinstance(function, dict) else None
    named, given = found(name_of(call), text, start), [found(value, text, start) for value in values_of(arguments)]
    lost = [f"{where}.name"] * (named < 0) + [f"{where}.arguments"] * any(place < 0 for place in given)
    return lost, start if lost else max(named, *given, start)


def values_of(value: Any) -> Iterator[str]:
    """Yield keys and values of a call's arguments, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from values_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from values_of(item)
    elif isinstance(value, str):
        yield value.strip()
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def found(wanted: str, text: str, start: int = 0) -> int:
    """Return where the wanted text ends; -1 if it is not found."""
    hit = span(wanted, text, start)
    return hit[1] if hit else -1


def span(wanted: str, text: str, start: int = 0) -> tuple[int, int] | None:
    """Return where the wanted text begins and ends, unchanged or as JSON and Python write it."""
    if hit := span_as_it_is(wanted, text, start):
        return hit
    written = dict.fromkeys([json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1], repr(wanted)[1:-1]])
    return next((hit for each in written if (hit := span_as_it_is(each, text, start))), None)


def span_as_it_is(wanted: str, text: str, start: int) -> tuple[int, int] | None:
    """Search like str.find, whose preparation takes ten times as long as its search for a long text."""
    head = wanted[:HEAD]
    place = text.find(head, start)
    while place >= 0 and not text.startswith(wanted, place):
        place = text.find(head, place + 1)
    return (place, place + len(wanted)) if place >= 0 else None
