"""Converts each format of training data into Rows.

    messages            messages: [{role, content, tool_calls?, name?, tool_call_id?, reasoning_content?, thinking?, weight?}]
    sharegpt            conversations: [{from: human | gpt | system | tool | ..., value}]
    alpaca              instruction, output, and optionally input
    prompt_completion   prompt, completion: both text, or both lists of messages
    text                text
    prompt              prompt alone, text or a list of messages, with an answer or tests: for rewards in RL
    preference          chosen, rejected: two answers to one prompt, in the forms of `tasks.data.preferences`

A conversation may also have the columns `system`, `history` ([[question, answer]] or messages) and `tools` (or `functions`). Lists may
be JSON text, a message's content a list of text parts. An answer with a `weight`, `loss` or `train` of 0 is not trained on.

Nothing is guessed: a row that does not fit raises BadRow, with what was found and what is expected. Columns that no format reads are
reported as ignored. Any prompt may also have `answer` (the right answer), `tests` and `extra` (an object), which rewards see. Any
answer may have `label` or `kto_tag` (whether it is desirable). An optional column without content counts as absent.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from tasks.data.messages import content, message_list, question
from tasks.data.preferences import LABELS, OTHER_ANSWERS, PROMPTS, label, other_answer, two_answers
from tasks.data.rows import Row
from tasks.data.values import BadRow, blank, describe, numeral, parsed, refuse_unstorable, text, unpacked

FOR_REWARDS = ("answer", "tests", "extra")
AROUND = ("system", "history")  # columns whose messages come before a conversation
TOOLS = ("tools", "functions")
RESERVED = (
    "prompts",
    "completions",
    "id",
    "answer",
    "tests",
    "tools",
    "scorer",
    "special_tokens",
)  # names that have another meaning than a column of `extra`
# Format -> columns it needs, columns it also reads. `auto` takes the first format whose needed columns are present.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), (*PROMPTS, "input", *AROUND, *TOOLS, *FOR_REWARDS)),
    "messages": (("messages",), (*OTHER_ANSWERS, *LABELS, *AROUND, *TOOLS, *FOR_REWARDS)),
    "sharegpt": (("conversations",), (*LABELS, *AROUND, *TOOLS, *FOR_REWARDS)),
    "alpaca": (("instruction", "output"), ("input", *LABELS, *AROUND, *TOOLS, *FOR_REWARDS)),
    "prompt_completion": (("prompt", "completion"), (*LABELS, *AROUND, *TOOLS, *FOR_REWARDS)),
    "text": (("text",), ()),
    "prompt": (("prompt",), (*AROUND, *TOOLS, *FOR_REWARDS)),
}
LAST = "a row to learn from ends with an answer: cut the conversation after its last answer, or give an `answer` for rewards"
KNOWN = frozenset(name for needed, read in COLUMNS.values() for name in needed + read)


def detect(record: dict[str, Any]) -> str:
    for name, (needed, _) in COLUMNS.items():
        if record.keys() >= set(needed):
            if name == "prompt" and all(blank(record.get(column)) for column in FOR_REWARDS):
                hint = "for rewards that need only a prompt, set `format: prompt`"
                raise BadRow(f"found a prompt alone, expected one with completion, or with {', '.join(FOR_REWARDS)}", hint)
            return name
    raise BadRow(
        f"found columns {', '.join(record) or 'none'}, expected {', or '.join(' and '.join(needed) for needed, _ in COLUMNS.values())}",
        "name the columns: `columns: {prompt: question, completion: solution}`",
    )


def to_row(record: dict[str, Any], name: str, source: str, ignored: Counter[str]) -> Row:
    """Read `record` (without absent values) in format `name`. Counts in `ignored` the values it does not read."""
    needed, read = COLUMNS[name]
    for column in needed:
        if column not in record:
            allowed = ", ".join(needed) + (f" (and perhaps {', '.join(read)})" if read else "")
            raise BadRow(f"found no {column} (columns: {', '.join(record) or 'none'}), expected for format {name}: {allowed}")
    if len(record) > len(needed):
        ignored.update(record.keys() - {*needed, *read})
        record = {column: value for column, value in record.items() if column in (*needed, *OTHER_ANSWERS) or not blank(value)}
    if name == "text":
        return Row(source, text=text(numeral(record["text"]), "text"))
    row = Row(source, answer=answer(record), extra=extra(record), label=label(record, ignored) if LABELS[0] in read else None)
    if name == "preference":
        asked, chosen, rejected = two_answers(record, ignored)
        row = replace(row, rejected=rejected)
        if isinstance(asked, str):
            refuse_around(record)
            return replace(row, prompt=asked, completion=chosen)
        messages = [*asked, chosen]
    elif name == "messages":
        messages = message_list(record["messages"], "messages", ignored)
        row = replace(row, rejected=other_answer(record, messages, ignored))
    elif name == "sharegpt":
        messages = message_list(record["conversations"], "conversations", ignored)
    elif name == "alpaca":
        messages = alpaca(record)
    else:
        given = [(column, numeral(unpacked(record[column], column))) for column in needed]
        if all(isinstance(value, str) for _, value in given):
            refuse_around(record)
            texts: dict[str, Any] = {column: text(value, column) for column, value in given}
            return replace(row, **texts)
        if len(given) == 2 and not all(isinstance(value, list) for _, value in given):
            found = ", ".join(f"{column} as {describe(value)}" for column, value in given)
            raise BadRow(f"found {found}, expected both text or both lists of messages")
        messages = [message for column, value in given for message in message_list(value, column, ignored)]
    messages = around(record, messages, ignored)
    check_conversation(messages, row, name)
    return replace(row, messages=tuple(messages))


def check_conversation(messages: list[dict[str, Any]], row: Row, name: str) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRow(f"found a system message at position {roles.index('system', 1)}, expected only the first")
    if "user" not in roles:
        raise BadRow("found no message from user, expected conversations with a question", "plain text goes into a column `text`")
    if roles[-1] == "user":
        if name != "prompt" and row.answer is None and not row.extra.keys() - {"tools"}:
            raise BadRow(f"the last message is from user, expected assistant, or user with {', '.join(FOR_REWARDS)}", LAST)
    elif roles[-1] != "assistant":
        raise BadRow(f"the last message is from {roles[-1]}, expected assistant", LAST)
    elif all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise BadRow("every answer has weight 0, expected at least one that is trained on", "remove the row")
    if roles[-1] == "user" and row.label is not None:
        raise BadRow("found a label without an answer, expected a conversation that ends with the answer that it judges")


# --- columns around a conversation ------------------------------------------------------------------------------------


def around(record: dict[str, Any], messages: list[dict[str, Any]], ignored: Counter[str]) -> list[dict[str, Any]]:
    """Return the conversation with the columns `system` and `history` before it."""
    if "history" in record:
        earlier = history(record["history"], ignored)
        if messages and messages[0]["role"] == "system":
            earlier, messages = [messages[0], *earlier], messages[1:]
        messages = earlier + messages
    if "system" in record:
        system = {"role": "system", "content": content(record["system"], "system")}
        if not messages or messages[0]["role"] != "system":
            messages = [system, *messages]
        elif messages[0]["content"].strip() != system["content"].strip():
            raise BadRow(
                "found a system prompt in the column system and another one in the conversation, expected one", "remove one of them"
            )
    return messages


def history(value: Any, ignored: Counter[str]) -> list[dict[str, Any]]:
    value = parsed(value, "history")
    if not isinstance(value, list):
        raise BadRow(f"history: found {describe(value)}, expected a list of [question, answer]")
    if value and isinstance(value[0], dict):
        return message_list(value, "history", ignored)
    messages: list[dict[str, Any]] = []
    for position, pair in enumerate(value):
        where = f"history[{position}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{where}: found {describe(pair)}, expected [question, answer]")
        messages += [
            {"role": "user", "content": text(numeral(pair[0]), f"{where}[0]")},
            {"role": "assistant", "content": text(numeral(pair[1]), f"{where}[1]")},
        ]
    return messages


def refuse_around(record: dict[str, Any]) -> None:
    """Raises BadRow if a prompt that is text has columns that only conversations can have."""
    for column in AROUND:
        if column in record:
            hint = "make it a conversation: `format: alpaca` and `columns: {instruction: prompt, output: completion}`"
            raise BadRow(f"found {column} beside a prompt that is text, expected beside a list of messages", hint)


def alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [question(record), {"role": "assistant", "content": text(numeral(record["output"]), "output")}]


# --- other columns ----------------------------------------------------------------------------------------------------


def answer(record: dict[str, Any]) -> str | None:
    value = record.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise BadRow(f"answer: found {value}, expected text or a number")
        return str(numeral(value))
    return None if value is None else text(value, "answer")


def extra(record: dict[str, Any]) -> dict[str, Any]:
    """Return what rewards and the template see in addition to the answer."""
    found = parsed(record.get("extra", {}), "extra")
    if not isinstance(found, dict):
        raise BadRow(f"extra: found {describe(found)}, expected an object")
    if taken := [name for name in RESERVED if name in found]:
        raise BadRow(f"extra: found {taken[0]}, expected names other than {', '.join(RESERVED)}")
    if "tests" in record:
        found = found | {"tests": record["tests"]}
    if found:
        refuse_unstorable(found, "extra, tests")
    if "tools" in record:
        return found | {"tools": tools(record["tools"])}
    if "functions" in record:  # OpenAI's older name
        return found | {"tools": [{"type": "function", "function": function} for function in tools(record["functions"])]}
    return found


def tools(value: Any) -> Any:
    value = parsed(value, "tools")
    if isinstance(value, list):
        value = [parsed(tool, f"tools[{position}]") for position, tool in enumerate(value)]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"tools: found {describe(value)}, expected a list of JSON schemas")
    return value


def refuse_row(row: Row) -> None:
    """Raises BadRow with the place in a conversation that cannot be stored as JSON."""
    for position, message in enumerate(row.messages or ()):
        for name, value in message.items():
            refuse_unstorable(value, f"messages[{position}].{name}")
    refuse_unstorable(row.rejected, "rejected")
    for name, value in row.extra.items():
        refuse_unstorable(value, name)
