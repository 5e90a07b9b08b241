"""The formats in which people keep training data, each turned into a Row.

    messages            messages: [{role, content, tool_calls?, name?, tool_call_id?, reasoning_content?, thinking?, weight?}]
    sharegpt            conversations: [{from: human | gpt | system | tool | ..., value}]
    alpaca              instruction, output, and perhaps input
    prompt_completion   prompt, completion: both text, or both lists of messages
    text                text
    prompt              prompt alone, text or a list of messages, with an answer or tests: what a reward needs, to be learnt by trying

Beside any conversation may stand `system`, `history` ([[question, answer]] or messages) and `tools`. Lists may be JSON text, a
message's content a list of text parts. `weight`, `loss` or `train` of 0 leaves an answer out of what is trained on.

Nothing is guessed: a row that does not fit raises BadRow, which says what was found and what is allowed. Columns that no
format reads are reported as ignored, never silently. Beside any prompt may stand `answer` (what a right answer says), `tests` and
`extra` (an object): rewards see them. An optional column without content counts as absent.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tasks.rows import THOUGHTS, Row

CALLING = ("function_call", "tool_call")  # roles whose content is a call
# Role, or `from`, as files write it -> the role that templates know.
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "human": "user", "gpt": "assistant"},
    **dict.fromkeys(CALLING, "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
WEIGHTS = ("weight", "loss", "train")
FOR_REWARDS = ("answer", "tests", "extra")
AROUND = ("system", "history")  # columns that hold what stands before a conversation
RESERVED = (
    "prompts",
    "completions",
    "id",
    "answer",
    "tests",
    "tools",
    "scorer",
    "special_tokens",
)  # mean something else beside those of `extra`
# Format -> columns it needs, columns it also reads. `auto` takes the first whose needs are there.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), (*AROUND, "tools", *FOR_REWARDS)),
    "sharegpt": (("conversations",), (*AROUND, "tools", *FOR_REWARDS)),
    "alpaca": (("instruction", "output"), ("input", *AROUND, "tools", *FOR_REWARDS)),
    "prompt_completion": (("prompt", "completion"), (*AROUND, "tools", *FOR_REWARDS)),
    "text": (("text",), ()),
    "prompt": (("prompt",), (*AROUND, "tools", *FOR_REWARDS)),
}
LAST = "a row to learn from ends with an answer: cut the conversation after its last one, or give an `answer` for rewards"
KNOWN = frozenset(name for needed, read in COLUMNS.values() for name in needed + read)
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


class BadRow(Exception):
    """A row does not fit; whoever knows its file and line turns this into StageFailed."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message.encode("utf-8", "backslashreplace").decode()  # names may hold half a surrogate pair
        self.hint = hint


class Number(float):
    """A number of a file, with the text that stands there."""

    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Python's json would keep the last value of a key that stands there twice, without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_float=Number)
STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def detect(record: dict[str, Any]) -> str:
    for name, (needed, _) in COLUMNS.items():
        if record.keys() >= set(needed):
            if name == "prompt" and all(blank(record.get(column)) for column in FOR_REWARDS):
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
    if len(record) > len(needed):
        ignored.update(record.keys() - {*needed, *read})
        record = {column: value for column, value in record.items() if column in needed or not blank(value)}
    if name == "text":
        return Row(source, text=text(record["text"], "text"))
    row = Row(source, answer=answer(record), extra=extra(record))
    if name == "messages":
        messages = message_list(record["messages"], "messages", ignored)
    elif name == "sharegpt":
        messages = message_list(record["conversations"], "conversations", ignored)
    elif name == "alpaca":
        messages = alpaca(record)
    else:
        given = [(column, unpacked(record[column], column)) for column in needed]
        if all(isinstance(value, str) for _, value in given):
            refuse_around(record)
            return replace(row, **{column: text(value, column) for column, value in given})
        if len(given) == 2 and not all(isinstance(value, list) for _, value in given):
            found = ", ".join(f"{column} as {describe(value)}" for column, value in given)
            raise BadRow(f"found {found}, allowed both text or both lists of messages")
        messages = [message for column, value in given for message in message_list(value, column, ignored)]
    messages = around(record, messages, ignored)
    check_conversation(messages, row, name)
    return replace(row, messages=tuple(messages))


def check_conversation(messages: list[dict[str, Any]], row: Row, name: str) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRow(f"found a system message at position {roles.index('system', 1)}, allowed only the first")
    if "user" not in roles:
        raise BadRow("found no message from user, allowed conversations with a question", "plain text goes into a column `text`")
    if roles[-1] == "user":
        if name != "prompt" and row.answer is None and not row.extra.keys() - {"tools"}:
            raise BadRow(f"the last message is from user, allowed assistant, or user with {', '.join(FOR_REWARDS)}", LAST)
    elif roles[-1] != "assistant":
        raise BadRow(f"the last message is from {roles[-1]}, allowed assistant", LAST)
    elif all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise BadRow("every answer has weight 0, allowed at least one that is trained on", "remove the row")


# --- what stands around a conversation --------------------------------------------------------------------------------


def around(record: dict[str, Any], messages: list[dict[str, Any]], ignored: Counter[str]) -> list[dict[str, Any]]:
    """The conversation with the columns `system` and `history` before it."""
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
                "found a system prompt in the column system and another one in the conversation, allowed one", "remove one of them"
            )
    return messages


def history(value: Any, ignored: Counter[str]) -> list[dict[str, Any]]:
    value = parsed(value, "history")
    if not isinstance(value, list):
        raise BadRow(f"history: found {describe(value)}, allowed a list of [question, answer]")
    if value and isinstance(value[0], dict):
        return message_list(value, "history", ignored)
    messages: list[dict[str, Any]] = []
    for position, pair in enumerate(value):
        where = f"history[{position}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{where}: found {describe(pair)}, allowed [question, answer]")
        messages += [
            {"role": "user", "content": text(pair[0], f"{where}[0]")},
            {"role": "assistant", "content": text(pair[1], f"{where}[1]")},
        ]
    return messages


def refuse_around(record: dict[str, Any]) -> None:
    """A plain prompt has no place for what a conversation begins with."""
    for column in AROUND:
        if column in record:
            hint = "make it a conversation: `format: alpaca` and `columns: {instruction: prompt, output: completion}`"
            raise BadRow(f"found {column} beside a prompt that is text, allowed beside a list of messages", hint)


# --- messages ---------------------------------------------------------------------------------------------------------


def message_list(items: Any, column: str, ignored: Counter[str]) -> list[dict[str, Any]]:
    items = parsed(items, column)
    if not isinstance(items, list) or not items:
        raise BadRow(f"{column}: found {describe(items)}, allowed a list of {'turns' if column == 'conversations' else 'messages'}")
    role, said = ("from", "value") if column == "conversations" else ("role", "content")
    found = [message(item, f"{column}[{position}]", role, said, ignored) for position, item in enumerate(items)]
    return [item for item in found if item is not None]


def message(item: Any, where: str, role_name: str, content_name: str, ignored: Counter[str]) -> dict[str, Any] | None:
    """None for a system prompt without content."""
    if not isinstance(item, dict) or role_name == "from" and "from" not in item:
        hint = "for turns with role and content: `columns: {messages: conversations}`" if role_name == "from" else ""
        raise BadRow(f"{where}: found {describe(item)}, allowed an object with {role_name} and {content_name}", hint)
    given = item.get(role_name)
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        hint = "for turns with from and value: `columns: {conversations: messages}`" if role_name == "role" and "from" in item else ""
        raise BadRow(f"{where}.{role_name}: found {describe(given)}, allowed {', '.join(ROLES)}", hint)
    said, where_said = item.get(content_name), f"{where}.{content_name}"
    if len(item) == 2 and given not in CALLING and isinstance(said, str) and content_name in item and said.strip():
        return {"role": role, "content": text(said, where_said)}  # most messages: the rest looks for what they do not have

    read = {role_name, content_name}
    calls = []
    if role == "assistant":
        calls = tool_calls(item.get("tool_calls"), f"{where}.tool_calls")
        if "function_call" in item:
            calls = [*calls, *called(item["function_call"], f"{where}.function_call")]
        read |= {"tool_calls", "function_call", *THOUGHTS}
        if given in CALLING:
            calls, said = [*calls, *called(said, where_said)], None
    elif any(not blank(parsed(item.get(name), f"{where}.{name}")) for name in ("tool_calls", "function_call")):
        raise BadRow(f"{where}.tool_calls: found calls of {role}, allowed only those of assistant")
    else:
        read |= {"tool_calls", "function_call"}
    if role == "system" and blank(said):
        return None
    found = {"role": role, "content": content(said, where_said) if not (calls and blank(said)) else ""}
    if calls:
        found["tool_calls"] = calls
    for name in ("name", "tool_call_id", *(THOUGHTS if role == "assistant" else ())):
        read.add(name)
        if not blank(item.get(name)):
            found[name] = text(item[name], f"{where}.{name}")
    read |= weighed(item, found, where)
    ignored.update(f"{where.partition('[')[0]}.{name}" for name, value in item.items() if name not in read and value is not None)
    return found


def weighed(item: dict[str, Any], found: dict[str, Any], where: str) -> set[str]:
    """Sets the weight of a message that is not trained on; returns the names that were read. Only answers can be trained on."""
    read = set()
    for name in WEIGHTS:
        value = item.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(f"{where}.{name}: found {describe(value)}, allowed 0 (not trained on) or 1")
        if found["role"] == "assistant" or value == 0:
            read.add(name)
        if found["role"] == "assistant" and value == 0:
            found["weight"] = 0
    return read


def called(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls written as {name, arguments}, one or a list of them, or as JSON text of that."""
    value = parsed(value, where)
    if blank(value):
        return []
    calls = tool_calls(value if isinstance(value, list) else [value], where)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = parsed(value, where)
    if blank(calls):  # columnar files fill in a null or an empty list
        return []
    if not isinstance(calls, list):
        hint = "put the call into a list" if isinstance(calls, dict) else ""
        raise BadRow(f"{where}: found {describe(calls)}, allowed a list of calls", hint)
    return [tool_call(call, f"{where}[{position}]") for position, call in enumerate(calls)]


def tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise BadRow(f"{where}: found {describe(function)}, allowed an object with name and arguments")
    text(function.get("name"), f"{where}.name")
    arguments = function.get("arguments")
    if blank(arguments):
        others = sorted(name for name in function.keys() - {"name", "arguments", "id", "type", "index"} if not blank(function[name]))
        if others:
            raise BadRow(f"{where}: found no arguments (fields: name, {', '.join(others)}), allowed an object with name and arguments")
        function = function | {"arguments": {}}
    elif not isinstance(parsed(arguments, f"{where}.arguments"), dict):
        raise BadRow(f"{where}.arguments: found {describe(arguments)}, allowed an object")
    return call | {"function": function} if "function" in call else function


def content(value: Any, where: str) -> str:
    """Text, or the parts of a text."""
    if not isinstance(value, list):
        return text(value, where)
    parts = []
    for position, part in enumerate(value):
        said = part.get("text") if isinstance(part, dict) and part.get("type") in (None, "text", "input_text", "output_text") else part
        if not isinstance(said, str):
            kind = part["type"] if isinstance(part, dict) and isinstance(part.get("type"), str) else describe(part)
            raise BadRow(f"{where}[{position}]: found {kind}, allowed parts with type text, and their text")
        parts.append(said)
    return text("".join(parts), where)


def alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    """`input` follows the instruction on a new line."""
    question = text(record["instruction"], "instruction")
    if "input" in record:
        question += "\n" + text(record["input"], "input")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text(record["output"], "output")}]


# --- what stands beside -----------------------------------------------------------------------------------------------


def answer(record: dict[str, Any]) -> str | None:
    value = record.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise BadRow(f"answer: found {value}, allowed text or a number")
        return value.text if isinstance(value, Number) else str(value)
    return None if value is None else text(value, "answer")


def extra(record: dict[str, Any]) -> dict[str, Any]:
    """What rewards and the template see beside the answer."""
    found = parsed(record.get("extra", {}), "extra")
    if not isinstance(found, dict):
        raise BadRow(f"extra: found {describe(found)}, allowed an object")
    if taken := [name for name in RESERVED if name in found]:
        raise BadRow(f"extra: found {taken[0]}, allowed names other than {', '.join(RESERVED)}")
    if "tests" in record:
        found = found | {"tests": record["tests"]}
    if found:
        refuse_unstorable(found, "extra, tests")
    return found | ({"tools": tools(record["tools"])} if "tools" in record else {})


def tools(value: Any) -> Any:
    value = parsed(value, "tools")
    if isinstance(value, list):
        value = [parsed(tool, f"tools[{position}]") for position, tool in enumerate(value)]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"tools: found {describe(value)}, allowed a list of JSON schemas")
    return value


def refuse_row(row: Row) -> None:
    """Raises BadRow with the place in a conversation that JSON cannot hold."""
    for position, message in enumerate(row.messages or ()):
        for name, value in message.items():
            refuse_unstorable(value, f"messages[{position}].{name}")
    for name, value in row.extra.items():
        refuse_unstorable(value, name)


def refuse_unstorable(value: Any, where: str) -> None:
    """Dates and bytes of a parquet file, NaN, half a surrogate pair, and what is nested without end."""
    try:
        STRICT.encode(value).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: {half_a_pair(error)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{where}: found what JSON cannot hold ({error}), allowed text, numbers, lists and objects") from error


# --- values -----------------------------------------------------------------------------------------------------------


def blank(value: Any) -> bool:
    """Nothing, or without content. 0 and false are values."""
    return value is None or isinstance(value, str | list | dict) and (not value or isinstance(value, str) and not value.strip())


def unpacked(value: Any, where: str) -> Any:
    """Messages in columnar files are often kept as JSON; other text stays as it is."""
    return parsed(value, where) if isinstance(value, str) and MESSAGES_AS_TEXT.match(value) else value


def parsed(value: Any, where: str) -> Any:
    """Lists in columnar files are often kept as JSON."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: found text that is no JSON ({error})") from error


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: found {describe(value)}, allowed text")
    if not value.strip():
        raise BadRow(f"{where}: found empty text, allowed text with content")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: {half_a_pair(error)}") from error
    return value


def half_a_pair(error: UnicodeEncodeError) -> str:
    return f"found half a surrogate pair ({error.object[error.start]!r}), allowed valid Unicode"


def describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 30 else value[:27] + "...")
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"{'float' if isinstance(value, float) else type(value).__name__} {value}"


def readable(names: Iterable[str]) -> None:
    """Raises BadRow where the name of a column holds half a surrogate pair."""
    try:
        " ".join(names).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"column {error.object!r}: {half_a_pair(error)}") from error
