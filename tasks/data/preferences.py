"""Reads two answers to one prompt, and labels of single answers.

    prompt, chosen, rejected                   text; or messages, where the prompt may still be text
    chosen, rejected                           two conversations with a common beginning, the prompt
    conversations (or messages), chosen, ...   a conversation, and the two messages that could follow (LLaMA-Factory)
    instruction, input, chosen, rejected       Alpaca's question, and two answers as text
    messages, rejected_response                a conversation with the chosen answer, and the other one (ms-swift); with
                                               rejected_messages the other one ends a conversation of its own

The two answers are one message each, the last one: conversations that part earlier are refused, because the turns of a user in
between are nobody's answer. A prompt beside whole conversations must be part of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tasks.data.messages import message, message_list, question
from tasks.data.rows import tidy
from tasks.data.values import BadRow, describe, text, unpacked

PROMPTS = ("conversations", "messages", "instruction", "prompt")
OTHER_ANSWERS = ("rejected_response", "rejected_messages")
LABELS = ("label", "kto_tag")
WORDS = {"true": True, "false": False}

Message = dict[str, Any]


def two_answers(record: dict[str, Any], ignored: Counter[str]) -> tuple[list[Message] | str, Any, Any]:
    """Return the prompt, the chosen and the rejected answer: three texts, or a conversation and two messages."""
    given = {name: unpacked(record[name], name) for name in ("chosen", "rejected")}
    asked = [name for name in PROMPTS if name in record]
    prompt = unpacked(record.get("prompt"), "prompt")
    if asked == ["prompt"] and all(isinstance(value, str) for value in (prompt, *given.values())):
        chosen, rejected = (text(value, name) for name, value in given.items())
        refuse_same(chosen, rejected)
        return text(prompt, "prompt"), chosen, rejected
    answers = {name: turns(value, name, ignored) for name, value in given.items()}
    alone = {name: len(each) == 1 and each[0]["role"] == "assistant" for name, each in answers.items()}
    if not any(alone.values()):
        return whole(answers["chosen"], answers["rejected"], record, ignored)
    if not all(alone.values()):
        raise BadRow("found one answer and one conversation as chosen and rejected, expected two of the same form")
    if len(asked) != 1:
        found = " and ".join(asked) if asked else "no prompt"
        raise BadRow(f"found {found} beside chosen and rejected, expected one of {', '.join(PROMPTS)}")
    return parted(before(record, asked[0], ignored), answers["chosen"][0], answers["rejected"][0])


def turns(value: Any, name: str, ignored: Counter[str]) -> list[Message]:
    """Read a text, a message or a list of messages; either form of messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": text(value, name)}]
    items = [value] if isinstance(value, dict) else value
    if isinstance(items, list) and items and isinstance(items[0], dict) and "from" in items[0] and "role" not in items[0]:
        found = [message(item, f"{name}[{position}]", "from", "value", ignored) for position, item in enumerate(items)]
        return [each for each in found if each is not None]
    return message_list(items, name, ignored)


def before(record: dict[str, Any], name: str, ignored: Counter[str]) -> list[Message]:
    """Return the conversation that the two answers could continue."""
    if name == "instruction":
        return [question(record)]
    value = unpacked(record[name], name)
    return [{"role": "user", "content": text(value, name)}] if isinstance(value, str) else turns(value, name, ignored)


def whole(chosen: list[Message], rejected: list[Message], record: dict[str, Any], ignored: Counter[str]) -> tuple[list[Message], Any, Any]:
    """Split two conversations into their common beginning and the two last answers."""
    *start, last = chosen
    *other_start, other = rejected
    if tidy(start) != tidy(other_start):
        pairs = enumerate(zip(chosen, rejected, strict=False))
        place = next((i for i, (one, other) in pairs if tidy(one) != tidy(other)), min(len(chosen), len(rejected)))
        found = f"found {len(chosen)} and {len(rejected)} messages that differ from message {place} on"
        hint = f"cut both after message {place}, if it is an answer"
        raise BadRow(f"chosen, rejected: {found}, expected conversations that differ in their last message", hint)
    if "prompt" in record and not within(before(record, "prompt", ignored), start):
        raise BadRow("prompt: found text that is not in the conversations chosen and rejected, expected a part of them", "remove it")
    ignored.update(name for name in PROMPTS[:3] if name in record)
    return parted(start, last, other)


def within(prompt: list[Message], start: list[Message]) -> bool:
    return all(any(tidy(asked["content"]) == tidy(each["content"]) for each in start) for asked in prompt)


def parted(prompt: list[Message], chosen: Message, rejected: Message) -> tuple[list[Message], Message, Message]:
    """Return the three parts, checked: two different answers to a user or a tool."""
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer["role"] != "assistant":
            raise BadRow(f"{name}: the last message is from {answer['role']}, expected assistant")
        if answer.get("weight") == 0:
            raise BadRow(f"{name}: found an answer of weight 0, expected two answers that are compared", "remove the weight")
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        found = f"a message from {prompt[-1]['role']}" if prompt else "nothing"
        raise BadRow(f"found {found} before the two answers, expected a question")
    refuse_same(chosen, rejected)
    return prompt, chosen, rejected


def refuse_same(chosen: Any, rejected: Any) -> None:
    if tidy(chosen) == tidy(rejected):
        raise BadRow("chosen and rejected are the same, expected two different answers", "remove the row")


def other_answer(record: dict[str, Any], messages: list[Message], ignored: Counter[str]) -> Message | None:
    """Return the rejected answer beside a conversation that ends with the chosen one, or None without one."""
    given = [name for name in OTHER_ANSWERS if name in record]
    if not given:
        return None
    if len(given) == 2 or any(name in record for name in LABELS):
        found = " and ".join([*given, *(name for name in LABELS if name in record)])
        raise BadRow(f"found {found}, expected one of them")
    other = turns(unpacked(record[given[0]], given[0]), given[0], ignored)
    *start, chosen = messages
    if len(other) == 1:
        return parted(start, chosen, other[0])[2]
    return whole(messages, other, {}, ignored)[2]  # type: ignore[no-any-return]


def label(record: dict[str, Any], ignored: Counter[str]) -> bool | None:
    """Return whether the answer is desirable; None without a label. A `label` that is neither true nor false has another meaning."""
    for name in LABELS:
        value = record.get(name)
        value = WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool):
            return value
        if value is not None and name == "kto_tag":
            raise BadRow(f"kto_tag: found {describe(value)}, expected true or false")
        if value is not None:
            ignored[name] += 1
    return None
