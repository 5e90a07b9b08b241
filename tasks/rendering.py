"""What a model sees of a conversation: the text that its chat template writes, and where each answer begins in it.

An answer is what a model has to write after the prompt that a server would send at that moment, up to and with what the template
writes after it, the end of the turn. A template may tell an answer apart by what it writes around it alone: so every turn is
rendered as it was asked, and nothing is assumed of the template but what a few made-up conversations show (`form`).

Left out: pictures and sound, and arguments of templates (`enable_thinking` and the like): a server that sets them sends another
prompt than the one that was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.rows import Row
from tasks.scoring import TAGS, said
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]

# Words that no template writes by itself.
QUESTION, ANSWER, FUNCTION, NAME, VALUES = "Zquestion", "Zanswer", "zfunction", "zname", ("Zvalue", "Zother")
HEAD = 24  # characters
# What a generation prompt may open (`<think>`), or open and close at once.
THINKING = re.compile(r"\s*(?:(?P<open>[<\[])(?P<name>[\w:|]+)(?P<close>[>\]])\s*(?P<closed>[<\[]/(?P=name)[>\]]\s*)?)?")


@dataclass(frozen=True)
class Turn:
    prompt: str
    """What a server sends to the model."""
    answer: str
    """What the model is to write after it, with the end of the turn."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Form:
    """How a template takes what a row says, and what it writes around an answer."""

    parts: bool = False
    """Contents are lists of parts (`[{type: text, text: ...}]`): as text, the template would lose them."""
    text_arguments: bool = False
    """Arguments of calls are JSON text: the template joins them to a string. Elsewhere they are objects."""
    no_content: bool = False
    """A turn that only calls tools has null as its content: with an empty one, the template would lose the calls."""
    ends: tuple[int, ...] = ()
    """Tokens that it writes after an answer, or after calls: the first of them ends a turn. None where it writes no end."""
    opened: str = ""
    """What the generation prompt has after the beginning of an answer, and the rendered conversation has not: `<think>` and the like."""


def conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The row's whole text: as its last answer was asked and given, or, where it ends with a question, without a generation prompt."""
    assert row.messages is not None
    last = len(row.messages) - 1
    if form(tokenizer).opened and row.messages[last]["role"] == "assistant":
        return turn(row, last, tokenizer).text
    return render_text(row.messages, row, tokenizer)


def turn(row: Row, position: int, tokenizer: PreTrainedTokenizerBase) -> Turn:
    """The message at `position` as the answer to those before it. Raises StageFailed(data) where the template does not show which
    part of the text that is."""
    assert row.messages is not None
    message, opened = row.messages[position], form(tokenizer).opened
    prompt = render_text(row.messages[:position], row, tokenizer, add_generation_prompt=True)
    whole = render_text(row.messages[: position + 1], row, tokenizer)
    if whole.startswith(prompt):
        return Turn(prompt, whole[len(prompt) :])
    begun = prompt.removesuffix(opened)
    if not opened or begun == prompt or not whole.startswith(begun):
        raise StageFailed(
            "data",
            f"the chat template renders row {row.id} so that the text before message {position} changes with the message itself",
            "the prompt that is trained would not be the one that is asked: take another model, or mend its chat template",
        )
    answer = whole[len(begun) :]
    block = THINKING.fullmatch(opened)
    if block and block["open"] and not block["closed"]:  # what was opened is closed before anything is said
        start, end = (f"{block['open']}{slash}{block['name']}{block['close']}" for slash in ("", "/"))
        thought, apart = thoughts(message, start, end)
        answer = f"{thought}\n{end}\n\n{answer if apart else answer.lstrip(chr(10))}"
    return Turn(prompt, answer)


def thoughts(message: dict[str, Any], start: str, end: str) -> tuple[str, bool]:
    """What the model thought before it answered, and whether the message has it in a field of its own, not within its content."""
    before, closed, _ = (message.get("content") or "").partition(end)
    if closed and not message.get("reasoning_content"):
        return before.removeprefix(start).strip("\n"), False
    return str(message.get("reasoning_content") or "").strip("\n"), True


def render_text(messages: Messages, row: Row, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        hint = "use an instruct model, or rows of plain text"
        raise StageFailed("data", "the model has no chat template, but rows are conversations", hint)
    try:
        return rendered(messages, row.extra.get("tools"), tokenizer, form(tokenizer), add_generation_prompt)
    except Exception as error:  # a template may raise anything: its own refusal, as of a system prompt, or what Python says of a type
        from jinja2 import TemplateError  # comes with transformers

        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        hint = "change the rows, or take another model"
        raise StageFailed("data", f"the chat template refuses row {row.id}: {why}", hint) from error


def rendered(messages: Messages, tools: Any, tokenizer: PreTrainedTokenizerBase, form: Form, add_generation_prompt: bool = False) -> str:
    given = [adapted(message, form) for message in messages]
    return str(tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt))


def adapted(message: dict[str, Any], form: Form) -> dict[str, Any]:
    """The message as the template takes it."""
    changed: dict[str, Any] = {}
    if form.parts and message.get("content") is not None:
        changed["content"] = [{"type": "text", "text": message["content"]}]
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [called(call, form.text_arguments) for call in calls]
        if form.no_content and not message.get("content"):
            changed["content"] = None
    return {**message, **changed} if changed else message


def called(call: Any, as_text: bool) -> Any:
    """The call with its arguments as text or as an object, whichever it had."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call  # the template gets what there is
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


# --- what a template leaves out ---------------------------------------------------------------------------------------


def unrendered(row: Row, text: str) -> list[str]:
    """The fields of a row that its rendered text does not hold, such as `messages[0].content`. Contents of users, tools and the
    assistant are looked for one after another, so that a short one is not found within a later one; a template may put a system
    prompt anywhere."""
    missing, position = [], 0
    assert row.messages is not None
    for number, message in enumerate(row.messages):
        where, content, last = f"messages[{number}]", message.get("content") or "", number == len(row.messages) - 1
        pieces = [content]
        if message["role"] == "assistant" and (
            "</" in content or "[/" in content
        ):  # a template may write thoughts in its own way, and leaves those of earlier turns out
            pieces = TAGS.split(content) if last else [said(content)]
        place = 0 if message["role"] == "system" else position
        for piece in pieces:
            if place >= 0:
                place = found(piece.strip(), text, place)
        if place < 0:
            missing.append(f"{where}.content")
        elif message["role"] != "system":
            position = place
        if last and found((message.get("reasoning_content") or "").strip(), text) < 0:
            missing.append(f"{where}.reasoning_content")
        for each, call in enumerate(message.get("tool_calls") or []):
            missing += lost_of_call(called(call, False), text, f"{where}.tool_calls[{each}]")
    for number, tool in enumerate(row.extra.get("tools") or []):
        if found(name_of(tool), text) < 0:
            missing.append(f"tools[{number}]")
    return missing


def name_of(of: Any) -> str:
    """The name of a tool, or of the one that is called."""
    function = of.get("function", of) if isinstance(of, dict) else None
    return str(function.get("name") or "") if isinstance(function, dict) else ""


def lost_of_call(call: Any, text: str, where: str) -> Iterator[str]:
    if found(name_of(call), text) < 0:
        yield f"{where}.name"
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if any(found(value, text) < 0 for value in values_of(arguments)):
        yield f"{where}.arguments"


def values_of(value: Any) -> Iterator[str]:
    """Keys and values of what a call hands over, as text."""
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
    """Where the wanted text ends, as it is or as JSON and Python write it; -1 where it is not there."""
    if (place := found_as_it_is(wanted, text, start)) >= 0:
        return place
    written = dict.fromkeys([json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1], repr(wanted)[1:-1]])
    return next((place for each in written if (place := found_as_it_is(each, text, start)) >= 0), -1)


def found_as_it_is(wanted: str, text: str, start: int) -> int:
    """As by str.find, which prepares for ten times as long as it searches where it looks for a long text."""
    head = wanted[:HEAD]
    place = text.find(head, start)
    while place >= 0 and not text.startswith(wanted, place):
        place = text.find(head, place + 1)
    return place + len(wanted) if place >= 0 else -1


# --- the end of a turn ------------------------------------------------------------------------------------------------


def ends(tokenizer: PreTrainedTokenizerBase, listed: Any = None) -> list[int]:
    """Tokens that end an answer: what the template writes after one, the eos token, which ends plain text, and those `listed` as
    eos_token_id of a generation_config, a number or several."""
    known = listed if isinstance(listed, list) else [listed]
    of_turns = form(tokenizer).ends if tokenizer.chat_template is not None else ()
    return [token for token in dict.fromkeys([*of_turns, tokenizer.eos_token_id, *known]) if token is not None]


def check_end(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, no_end: bool) -> None:
    """Raises StageFailed(config) where conversations are to be trained under a template that ends no turn."""
    if no_end or tokenizer.chat_template is None or form(tokenizer).ends or all(row.messages is None for row in rows):
        return
    message = "the chat template writes no token after an answer: trained on it, a model does not learn where to stop"
    raise StageFailed("config", message, "take a template that ends turns, or set `no_end: true`: answers then run to their longest")


# --- what a template is like ------------------------------------------------------------------------------------------


def form(tokenizer: PreTrainedTokenizerBase) -> Form:
    return _form(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase, template: str) -> Form:
    """Tries made-up conversations: what of them arrives in the text, and what stands where."""
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    found = next((f for f in (Form(), Form(parts=True)) if QUESTION in tried([question], None, tokenizer, f)), Form())
    calls = [{"type": "function", "function": {"name": FUNCTION, "arguments": {NAME: VALUES[0]}}}]
    asked = [question, {"role": "assistant", "content": "", "tool_calls": calls}]
    for text_arguments, no_content in ((False, False), (True, False), (False, True), (True, True)):
        tries = Form(found.parts, text_arguments, no_content)
        text = tried(asked, TOOLS, tokenizer, tries).rpartition(QUESTION)[2]
        if FUNCTION in text and VALUES[0] in text and repr({NAME: VALUES[0]}) not in text:
            found = tries
            break
    prompt, whole = tried([question], None, tokenizer, found, True), tried([question, answer], None, tokenizer, found)
    common = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), min(len(prompt), len(whole)))
    opened = prompt[common:] if ANSWER in whole[common:] and THINKING.fullmatch(prompt[common:]) else ""
    return replace(found, opened=opened, ends=ends_of_turns(question, answer, tokenizer, found))


def ends_of_turns(question: dict[str, Any], answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase, form: Form) -> tuple[int, ...]:
    """The tokens of its own that a template writes after an answer, and the last of them after calls, which have marks within."""
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def marked(text: str) -> list[int]:
        return [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in marks]

    _, there, after = tried([question, answer], None, tokenizer, form).rpartition(ANSWER)
    ends = marked(after) if there else []
    for count in (2, 1):  # some templates know single calls alone
        calls = [{"type": "function", "function": {"name": FUNCTION, "arguments": {NAME: value}}} for value in VALUES[:count]]
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        _, there, after = tried([question, called], TOOLS, tokenizer, form).rpartition(VALUES[count - 1])
        if there:
            between = _.rpartition(VALUES[0])[2] if count == 2 else ""
            ends += [token for token in marked(after) if token not in marked(between)][-1:]
            break
    return tuple(dict.fromkeys(ends))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": FUNCTION,
            "description": FUNCTION,
            "parameters": {"type": "object", "properties": {NAME: {"type": "string", "description": NAME}}},
        },
    }
]


def tried(messages: Messages, tools: Any, tokenizer: PreTrainedTokenizerBase, form: Form, add_generation_prompt: bool = False) -> str:
    """What the template writes; nothing where it refuses."""
    try:
        return rendered(messages, tools, tokenizer, form, add_generation_prompt)
    except Exception:
        return ""
