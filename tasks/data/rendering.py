"""Renders conversations through the chat template, and finds where each answer begins in the text.

An answer is what a model has to write after the prompt that a server would send at that point, up to and including what the template
writes after it, the end of the turn. A template may render an answer differently depending on the turns around it, so each turn is
rendered as it was asked, and a template's properties are found by rendering a few artificial conversations (`form`).

Left out: images and sound, and template arguments (`enable_thinking` and similar): a server that sets them sends another prompt than
the trained one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.data.rows import THOUGHTS, Row
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]

# Words that no template writes on its own.
QUESTION, ANSWER, FUNCTION, NAME, VALUES = "Zquestion", "Zanswer", "zfunction", "zname", ("Zvalue", "Zother")
# What a generation prompt may open (`<think>`), or open and close at once.
THINKING = re.compile(r"\s*(?:(?P<open>[<\[])(?P<name>[\w:|]+)(?P<close>[>\]])\s*(?P<closed>[<\[]/(?P=name)[>\]]\s*)?)?")


@dataclass(frozen=True)
class Turn:
    prompt: str
    """The text that a server sends to the model."""
    answer: str
    """The text that the model should write after it, including the end of the turn."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Form:
    """Describes the input that a template needs, and what it writes around an answer."""

    parts: bool = False
    """Contents must be lists of parts (`[{type: text, text: ...}]`): as text, the template would drop them."""
    text_arguments: bool = False
    """Arguments of calls must be JSON text, because the template concatenates them. Otherwise they are objects."""
    no_content: bool = False
    """A turn that only calls tools must have null as its content: with an empty text, the template would drop the calls."""
    ends: tuple[int, ...] = ()
    """Tokens that the template writes after an answer or after calls: the first one ends a turn. Empty if it writes none."""
    opened: str = ""
    """Text, such as `<think>`, that the generation prompt has after the beginning of an answer and the rendered conversation has not."""
    apart: bool = False
    """A prompt is not always a prefix of its continued conversation, for example because a system prompt moves into the last question."""
    closing: str = ""
    """The end of an answer, if the template writes it only when the conversation continues, not after the last answer."""


def conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render the whole row: as its last answer was asked and given, or without a generation prompt if it ends with a question."""
    assert row.messages is not None
    last = len(row.messages) - 1
    known = form(tokenizer)
    if (known.opened or known.apart or known.closing) and row.messages[last]["role"] == "assistant":
        return turn(row, last, tokenizer).text
    return render_text(row.messages, row, tokenizer)


def turn(row: Row, position: int, tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return the message at `position` as the answer to those before it. Raises StageFailed(data) if the answer cannot be located in the
    rendered text."""
    assert row.messages is not None
    message, opened = row.messages[position], form(tokenizer).opened
    prompt = render_text(row.messages[:position], row, tokenizer, add_generation_prompt=True)
    whole = render_text(row.messages[: position + 1], row, tokenizer) + form(tokenizer).closing
    if whole.startswith(prompt):
        return Turn(prompt, whole[len(prompt) :])
    begun = prompt.removesuffix(opened)
    if not opened or begun == prompt or not whole.startswith(begun):
        if (answer := after_question(row.messages[position - 1], prompt, whole)) is not None:
            return Turn(prompt, answer)
        raise StageFailed(
            "data",
            f"the chat template renders row {row.id} so that the text before message {position} changes with the message itself",
            "training would use another prompt than inference: use another model, or fix its chat template",
        )
    answer = whole[len(begun) :]
    block = THINKING.fullmatch(opened)
    if block and block["open"] and not block["closed"]:  # an opened block is closed before the answer
        start, end = (f"{block['open']}{slash}{block['name']}{block['close']}" for slash in ("", "/"))
        thought, apart = thoughts(message, start, end)
        answer = f"{thought}\n{end}\n\n{answer if apart else answer.lstrip(chr(10))}"
    return Turn(prompt, answer)


def after_question(asked: dict[str, Any], prompt: str, whole: str) -> str | None:
    """Return the answer if the template renders the earlier messages differently: the text after the last message and after what follows
    that message in the prompt. None if these are not found."""
    content = (asked.get("content") or "").strip()
    _, there, rest = prompt.rpartition(content) if content else ("", "", "")
    place = whole.rfind(content + rest) if there and rest.strip() else -1
    return whole[place + len(content + rest) :] if place >= 0 else None


def thoughts(message: dict[str, Any], start: str, end: str) -> tuple[str, bool]:
    """Return the model's thoughts before its answer, and whether they are in their own field instead of in the content."""
    before, closed, _ = (message.get("content") or "").partition(end)
    thought = next((message[name] for name in THOUGHTS if message.get(name)), "")
    if closed and not thought:
        # Words before the mark are no thoughts, and under this template they have no place: `unrendered` reports them.
        return before.rpartition(start)[2].strip("\n"), False
    return str(thought).strip("\n"), True


def render_text(messages: Messages, row: Row, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        hint = "use an instruct model, or rows of plain text"
        raise StageFailed("data", "the model has no chat template, but rows are conversations", hint)
    try:
        return rendered(messages, row.extra.get("tools"), tokenizer, form(tokenizer), add_generation_prompt)
    except Exception as error:  # a template may raise anything: its own refusal, or a Python error
        from jinja2 import TemplateError  # comes with transformers

        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        hint = "change the rows, or use another model"
        raise StageFailed("data", f"the chat template refuses row {row.id}: {why}", hint) from error


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the row's prompt as a server would build it; empty for plain text."""
    messages = row.prompt_messages()
    return render_text(messages, row, tokenizer, add_generation_prompt=True) if messages is not None else row.prompt or ""


def rendered(messages: Messages, tools: Any, tokenizer: PreTrainedTokenizerBase, form: Form, add_generation_prompt: bool = False) -> str:
    given = [adapted(message, form) for message in messages]
    return str(tokenizer.apply_chat_template(given, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt))


def adapted(message: dict[str, Any], form: Form) -> dict[str, Any]:
    """Return the message in the form that the template needs."""
    changed: dict[str, Any] = {}
    if form.parts and message.get("content") is not None:
        changed["content"] = [{"type": "text", "text": message["content"]}]
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [called(call, form.text_arguments) for call in calls]
        if form.no_content and not message.get("content"):
            changed["content"] = None
    return {**message, **changed} if changed else message


def called(call: Any, as_text: bool) -> Any:
    """Return the call with its arguments as text or as an object, converted if needed."""
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
            return call  # the template gets them unchanged
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


# --- the end of a turn ------------------------------------------------------------------------------------------------


def ends(tokenizer: PreTrainedTokenizerBase, listed: Any = None) -> list[int]:
    """Return the tokens that end an answer: those that the template writes after one, the eos token, which ends plain text, and those
    `listed` as eos_token_id of a generation_config, a number or several."""
    known = listed if isinstance(listed, list) else [listed]
    of_turns = form(tokenizer).ends if tokenizer.chat_template is not None else ()
    return [token for token in dict.fromkeys([*of_turns, tokenizer.eos_token_id, *known]) if token is not None]


def check_end(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, no_end: bool) -> None:
    """Raises StageFailed(config) if conversations would be trained under a template that ends no turn."""
    if no_end or tokenizer.chat_template is None or form(tokenizer).ends or all(row.messages is None for row in rows):
        return
    message = "the chat template writes no token after an answer: trained on it, a model does not learn where to stop"
    raise StageFailed("config", message, "use a template that ends turns, or set `no_end: true`: answers then run to the maximum length")


# --- properties of a template -----------------------------------------------------------------------------------------


def form(tokenizer: PreTrainedTokenizerBase) -> Form:
    return _form(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase, template: str) -> Form:
    """Render artificial conversations to find a template's properties."""
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    found = next((f for f in (Form(), Form(parts=True)) if QUESTION in tried([question], None, tokenizer, f)), Form())
    asked: Messages = [question, {"role": "assistant", "content": "", "tool_calls": made_up_calls(1)}]
    for text_arguments, no_content in ((False, False), (True, False), (False, True), (True, True)):
        tries = Form(found.parts, text_arguments, no_content)
        text = tried(asked, TOOLS, tokenizer, tries).rpartition(QUESTION)[2]
        if FUNCTION in text and VALUES[0] in text and repr({NAME: VALUES[0]}) not in text:
            found = tries
            break
    prompt, whole = tried([question], None, tokenizer, found, True), tried([question, answer], None, tokenizer, found)
    common = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), min(len(prompt), len(whole)))
    opened = prompt[common:] if ANSWER in whole[common:] and THINKING.fullmatch(prompt[common:]) else ""
    apart = False
    for before in ([question], [{"role": "system", "content": FUNCTION}, question], [question, answer, question]):
        prompt, whole = tried(before, None, tokenizer, found, True), tried([*before, answer], None, tokenizer, found)
        apart = apart or (bool(whole) and not whole.startswith(prompt.removesuffix(opened)))
    ends = ends_of_turns(question, answer, tokenizer, found)
    between = tried([question, answer, question], None, tokenizer, found).partition(ANSWER)[2].rpartition(QUESTION)[0]
    if not ends and len(marked := marks_in(between, tokenizer)) > 1:  # a single one begins the next turn
        ends = (marked[0],)
        return replace(found, opened=opened, apart=apart, ends=ends, closing=tokenizer.decode(marked[0]))
    return replace(found, opened=opened, apart=apart, ends=ends)


def marks_in(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokenizer's special and added tokens in a text, in order."""
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in marks]


def ends_of_turns(question: dict[str, Any], answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase, form: Form) -> tuple[int, ...]:
    """Return the special and added tokens that a template writes after an answer, and the last one after calls, which contain others."""
    _, there, after = tried([question, answer], None, tokenizer, form).rpartition(ANSWER)
    ends = marks_in(after, tokenizer) if there else []
    for count in (2, 1):  # some templates support only single calls
        called = {"role": "assistant", "content": "", "tool_calls": made_up_calls(count)}
        _, there, after = tried([question, called], TOOLS, tokenizer, form).rpartition(VALUES[count - 1])
        if there:
            between = _.rpartition(VALUES[0])[2] if count == 2 else ""
            ends += [token for token in marks_in(after, tokenizer) if token not in marks_in(between, tokenizer)][-1:]
            break
    return tuple(dict.fromkeys(ends))


def made_up_calls(count: int) -> list[dict[str, Any]]:
    """Return artificial calls. Each id has nine letters, as Mistral's templates require."""
    functions = [{"name": FUNCTION, "arguments": {NAME: value}} for value in VALUES[:count]]
    return [{"type": "function", "id": "zcallzero", "function": function} for function in functions]


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
    """Render the messages; empty if the template refuses them."""
    try:
        return rendered(messages, tools, tokenizer, form, add_generation_prompt)
    except Exception:
        return ""
