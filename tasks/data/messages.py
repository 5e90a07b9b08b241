"""Converts messages of a conversation, with their tool calls, from the forms used in files into the form that templates know."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tasks.data.rows import THOUGHTS
from tasks.data.values import BadRow, blank, describe, numeral, parsed, refuse_unstorable, text

CALLING = ("function_call", "tool_call")  # roles whose content is a call
# Role in files (`role` or `from`) -> the role that templates know.
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "human": "user"},
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(CALLING, "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
WEIGHTS = ("weight", "loss", "train")


def message_list(items: Any, column: str, ignored: Counter[str]) -> list[dict[str, Any]]:
    items = parsed(items, column)
    if not isinstance(items, list) or not items:
        raise BadRow(f"{column}: found {describe(items)}, expected a list of {'turns' if column == 'conversations' else 'messages'}")
    role, said = ("from", "value") if column == "conversations" else ("role", "content")
    found = [message(item, f"{column}[{position}]", role, said, ignored) for position, item in enumerate(items)]
    return [item for item in found if item is not None]


def message(item: Any, where: str, role_name: str, content_name: str, ignored: Counter[str]) -> dict[str, Any] | None:
    """Convert one message. Returns None for a system prompt without content."""
    if not isinstance(item, dict) or (role_name == "from" and "from" not in item):
        hint = "for turns with role and content: `columns: {messages: conversations}`" if role_name == "from" else ""
        raise BadRow(f"{where}: found {describe(item)}, expected an object with {role_name} and {content_name}", hint)
    given = item.get(role_name)
    given = given.lower() if isinstance(given, str) and given not in ROLES else given
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        hint = "for turns with from and value: `columns: {conversations: messages}`" if role_name == "role" and "from" in item else ""
        raise BadRow(f"{where}.{role_name}: found {describe(item.get(role_name))}, expected {', '.join(ROLES)}", hint)
    said, where_said = item.get(content_name), f"{where}.{content_name}"
    if len(item) == 2 and given not in CALLING and isinstance(said, str) and content_name in item and said.strip():
        return {"role": role, "content": text(said, where_said)}  # most messages have no other fields

    if role == "assistant" and "reasoning_content" not in item and isinstance(item.get("reasoning"), str):
        item = {"reasoning_content" if name == "reasoning" else name: value for name, value in item.items()}  # vLLM's and OpenRouter's name
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
        raise BadRow(f"{where}.tool_calls: found calls of {role}, expected only those of assistant")
    else:
        read |= {"tool_calls", "function_call"}
    if role == "system" and blank(said):
        return None
    if role == "tool":
        said = result(said, where_said)
    empty = blank(said) and bool(calls or (role == "tool" and content_name in item))
    found: dict[str, Any] = {"role": role, "content": "" if empty else content(said, where_said)}
    if calls:
        found["tool_calls"] = calls
    for name in ("name", "tool_call_id", *(THOUGHTS if role == "assistant" else ())):
        read.add(name)
        if not blank(item.get(name)):
            found[name] = text(item[name], f"{where}.{name}")
    read |= weighed(item, found, where)
    ignored.update(f"{where.partition('[')[0]}.{name}" for name, value in item.items() if name not in read and value is not None)
    return found


def question(record: dict[str, Any]) -> dict[str, Any]:
    """Return Alpaca's question: the instruction and, on a new line, `input`; one of the two may be empty."""
    asked = [name for name in ("instruction", "input") if not blank(record.get(name))] or ["instruction"]
    return {"role": "user", "content": "\n".join(text(numeral(record[name]), name) for name in asked)}


def weighed(item: dict[str, Any], found: dict[str, Any], where: str) -> set[str]:
    """Set the weight of a message that is not trained on. Returns the names that were read. Only answers can be trained on."""
    read = set()
    for name in WEIGHTS:
        value = item.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(f"{where}.{name}: found {describe(value)}, expected 0 (not trained on) or 1")
        if found["role"] == "assistant" or value == 0:
            read.add(name)
        if found["role"] == "assistant" and value == 0:
            found["weight"] = 0
    return read


def result(value: Any, where: str) -> Any:
    """Return what a tool gives back: a content, or any other value as JSON."""
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, list) and value and all(isinstance(part, str) or (isinstance(part, dict) and "text" in part) for part in value):
        return value
    refuse_unstorable(value, where)
    return json.dumps(value, ensure_ascii=False)


def content(value: Any, where: str) -> str:
    """Return the text of a content, which may be a number or a list of parts."""
    if not isinstance(value, list):
        return text(numeral(value), where)
    parts = []
    for position, part in enumerate(value):
        said = part.get("text") if isinstance(part, dict) and part.get("type") in (None, "text", "input_text", "output_text") else part
        if not isinstance(said, str):
            kind = part["type"] if isinstance(part, dict) and isinstance(part.get("type"), str) else describe(part)
            raise BadRow(f"{where}[{position}]: found {kind}, expected parts with type text, and their text")
        parts.append(said)
    return text("".join(parts), where)


# --- calls ------------------------------------------------------------------------------------------------------------


def called(value: Any, where: str) -> list[dict[str, Any]]:
    """Read calls written as {name, arguments}: one, a list, or JSON text of either."""
    value = parsed(value, where)
    if blank(value):
        return []
    calls = tool_calls(value if isinstance(value, list) else [value], where)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = parsed(value, where)
    if blank(calls):  # columnar files write a null or an empty list
        return []
    if not isinstance(calls, list):
        hint = "put the call into a list" if isinstance(calls, dict) else ""
        raise BadRow(f"{where}: found {describe(calls)}, expected a list of calls", hint)
    return [tool_call(call, f"{where}[{position}]") for position, call in enumerate(calls)]


def tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise BadRow(f"{where}: found {describe(function)}, expected an object with name and arguments")
    text(function.get("name"), f"{where}.name")
    arguments = function.get("arguments")
    if blank(arguments):
        others = sorted(name for name in function.keys() - {"name", "arguments", "id", "type", "index"} if not blank(function[name]))
        if others:
            raise BadRow(f"{where}: found no arguments (fields: name, {', '.join(others)}), expected an object with name and arguments")
        function = function | {"arguments": {}}
    elif not isinstance(parsed(arguments, f"{where}.arguments"), dict):
        raise BadRow(f"{where}.arguments: found {describe(arguments)}, expected an object")
    return call | {"function": function} if "function" in call else function
