"""The formats in which people keep training data, each turned into a Row.

    messages            messages: [{role, content, tool_calls?}]
    sharegpt            conversations: [{from: human | gpt | system | tool, value}]
    alpaca              instruction, output, and perhaps input, system, history: [[question, answer]]
    prompt_completion   prompt, completion: both text, or both lists of messages
    text                text
    prompt              prompt alone, text or a list of messages, with an answer or tests: what a reward needs, to be learnt by trying

Nothing is guessed: a row that does not fit raises BadRow, which says what was found and what is allowed. Columns that no
format reads are reported as ignored, never silently. Beside any prompt may stand `answer` (what a right answer says), `tests` and
`extra` (an object): rewards see them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from tasks.rows import Row

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
MESSAGE_FIELDS = ("role", "content", "tool_calls")
FOR_REWARDS = ("answer", "tests", "extra")
RESERVED = ("prompts", "completions", "id", "answer", "tests", "tools", "scorer")  # names that mean something else beside those of `extra`
# Format -> columns it needs, columns it also reads. `auto` takes the first whose needs are there.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools", *FOR_REWARDS)),
    "sharegpt": (("conversations",), ("system", "tools", *FOR_REWARDS)),
    "alpaca": (("instruction", "output"), ("input", "system", "history", *FOR_REWARDS)),
    "prompt_completion": (("prompt", "completion"), ("tools", *FOR_REWARDS)),
    "text": (("text",), ()),
    "prompt": (("prompt",), ("tools", *FOR_REWARDS)),
}
LAST = "a row to learn from ends with an answer: cut the conversation after its last one, or give an `answer` for rewards"
KNOWN = frozenset(name for needed, read in COLUMNS.values() for name in needed + read)


class BadRow(Exception):
    """A row does not fit; whoever knows its file and line turns this into StageFailed."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint


def detect(record: dict[str, Any]) -> str:
    for name, (needed, _) in COLUMNS.items():
        if record.keys() >= set(needed):
            if name == "prompt" and not any(record.get(column) for column in FOR_REWARDS):
                hint = "for rewards that need no more than a prompt: `format: prompt`"
                raise BadRow(f"found a prompt alone, allowed one with completion, or with {', '.join(FOR_REWARDS)}", hint)
            return name
    raise BadRow(
        f"found columns {', '.join(record) or 'none'}, allowed {', or '.join(' and '.join(needed) for needed, _ in COLUMNS.values())}",
        "name the columns: `columns: {prompt: question, completion: solution}`",
    )


def to_row(record: dict[str, Any], name: str, source: str, ignored: Counter[str]) -> Row:
    """Reads `record` (absent values left out) in format `name`. Counts in `ignored` what it does not read."""
    needed, read = COLUMNS[name]
    for column in needed:
        if column not in record:
            allowed = ", ".join(needed) + (f" (and perhaps {', '.join(read)})" if read else "")
            raise BadRow(f"found no {column} (columns: {', '.join(record) or 'none'}), allowed for format {name}: {allowed}")
    ignored.update(record.keys() - {*needed, *read})
    if name == "text":
        return Row(source, text=text(record["text"], "text"))
    row = Row(source, answer=answer(record), extra=extra(record))
    if name == "messages":
        messages = message_list(record["messages"], "messages", ignored)
    elif name == "sharegpt":
        messages = system_of(record) + sharegpt(record["conversations"], ignored)
    elif name == "alpaca":
        messages = alpaca(record)
    elif name == "prompt":
        if isinstance(record["prompt"], str):
            return replace(row, prompt=text(record["prompt"], "prompt"))
        messages = message_list(record["prompt"], "prompt", ignored)
    elif isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        messages = message_list(record["prompt"], "prompt", ignored) + message_list(record["completion"], "completion", ignored)
    elif isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        return replace(row, prompt=text(record["prompt"], "prompt"), completion=text(record["completion"], "completion"))
    else:
        found = f"prompt as {describe(record['prompt'])}, completion as {describe(record['completion'])}"
        raise BadRow(f"found {found}, allowed both text or both lists of messages")
    check_conversation(messages, row, name)
    return replace(row, messages=tuple(messages))


def check_conversation(messages: list[dict[str, Any]], row: Row, name: str) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRow(f"found a system message at position {roles.index('system', 1)}, allowed only the first")
    if roles[-1] == "user":
        if name != "prompt" and row.answer is None and not row.extra.keys() - {"tools"}:
            raise BadRow(f"the last message is from user, allowed assistant, or user with {', '.join(FOR_REWARDS)}", LAST)
    elif roles[-1] != "assistant":
        raise BadRow(f"the last message is from {roles[-1]}, allowed assistant", LAST)
    if "user" not in roles:
        raise BadRow("found no message from user, allowed conversations with a question", "plain text goes into a column `text`")


def message_list(items: Any, column: str, ignored: Counter[str]) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not items:
        raise BadRow(f"{column}: found {describe(items)}, allowed a list of messages")
    return [message(item, f"{column}[{position}]", ignored) for position, item in enumerate(items)]


def message(item: Any, where: str, ignored: Counter[str]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRow(f"{where}: found {describe(item)}, allowed an object with role and content")
    role = item.get("role")
    if role not in ROLES:
        raise BadRow(f"{where}.role: found {describe(role)}, allowed {', '.join(ROLES)}")
    ignored.update(f"messages.{name}" for name, value in item.items() if name not in MESSAGE_FIELDS and value is not None)
    calls = parsed(item.get("tool_calls"), f"{where}.tool_calls")
    if not calls:  # columnar files fill in a null or an empty list
        return {"role": role, "content": text(item.get("content"), f"{where}.content")}
    if role != "assistant":
        raise BadRow(f"{where}.tool_calls: found calls of {role}, allowed only those of assistant")
    content = item.get("content")
    return {"role": role, "content": text(content, f"{where}.content") if content else "", "tool_calls": calls}


def sharegpt(items: Any, ignored: Counter[str]) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not items:
        raise BadRow(f"conversations: found {describe(items)}, allowed a list of turns")
    messages = []
    for position, item in enumerate(items):
        where = f"conversations[{position}]"
        if not isinstance(item, dict) or "from" not in item:
            hint = "for turns with role and content: `columns: {messages: conversations}`"
            raise BadRow(f"{where}: found {describe(item)}, allowed an object with from and value", hint)
        if item["from"] not in SHAREGPT_ROLES:
            raise BadRow(f"{where}.from: found {describe(item['from'])}, allowed {', '.join(SHAREGPT_ROLES)}")
        ignored.update(f"conversations.{name}" for name, value in item.items() if name not in ("from", "value") and value is not None)
        messages.append({"role": SHAREGPT_ROLES[item["from"]], "content": text(item.get("value"), f"{where}.value")})
    return messages


def alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    """`input` follows the instruction on a new line."""
    messages = system_of(record)
    history = parsed(record.get("history", []), "history")
    if not isinstance(history, list):
        raise BadRow(f"history: found {describe(history)}, allowed a list of [question, answer]")
    for position, pair in enumerate(history):
        where = f"history[{position}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{where}: found {describe(pair)}, allowed [question, answer]")
        messages += [
            {"role": "user", "content": text(pair[0], f"{where}[0]")},
            {"role": "assistant", "content": text(pair[1], f"{where}[1]")},
        ]
    question = text(record["instruction"], "instruction")
    if record.get("input", "") != "":
        question += "\n" + text(record["input"], "input")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": text(record["output"], "output")}]


def system_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text(record["system"], "system")}] if record.get("system", "") != "" else []


def answer(record: dict[str, Any]) -> str | None:
    value = record.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None if value is None else text(value, "answer")


def extra(record: dict[str, Any]) -> dict[str, Any]:
    """What rewards and the template see beside the answer."""
    found = parsed(record.get("extra", {}), "extra")
    if not isinstance(found, dict):
        raise BadRow(f"extra: found {describe(found)}, allowed an object")
    if taken := [name for name in RESERVED if name in found]:
        raise BadRow(f"extra: found {taken[0]}, allowed names other than {', '.join(RESERVED)}")
    found = found | {name: record[name] for name in ("tests",) if name in record}
    try:
        json.dumps(found, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # dates and bytes of a parquet file, NaN, half a surrogate pair
        raise BadRow(f"extra, tests: found what JSON cannot hold ({error}), allowed text, numbers, lists and objects") from error
    return found | ({"tools": tools(record)} if "tools" in record else {})


def tools(record: dict[str, Any]) -> Any:
    value = parsed(record["tools"], "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"tools: found {describe(value)}, allowed a list of JSON schemas")
    return value


def parsed(value: Any, where: str) -> Any:
    """Lists in columnar files are often kept as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"{where}: found text that is no JSON ({error})") from error


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: found {describe(value)}, allowed text")
    if not value.strip():
        raise BadRow(f"{where}: found empty text, allowed text with content")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: found half a surrogate pair ({error.object[error.start]!r}), allowed valid Unicode") from error
    return value


def describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 30 else value[:27] + "...")
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"{type(value).__name__} {value}"
