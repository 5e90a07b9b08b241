"""Decides which tokens of a row are trained on, for training, samples, calibration and scoring.

An answer is located in the rendered text (`tasks.data.rendering`), and its tokens by their offsets. The prompt before it gets the
tokens that a server would send, so that training and inference match: if a token would span the border, for example because an answer
begins with a newline, prompt and answer are tokenized separately. If a template renders a conversation differently once it continues,
for example without the thoughts of earlier turns, no single text holds every answer as it was asked for: such a row becomes one
sequence per answer. TRL's own masks are not used: `assistant_only_loss` needs `{% generation %}` marks that few templates have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, permutations, product
from typing import TYPE_CHECKING, Any

from tasks.data import marks
from tasks.data.rendering import Turn, called, conversation, ends, render_text, turn
from tasks.data.rows import Row
from tasks.data.thoughts import said, written
from tuneline.errors import StageFailed
from tuneline.kinds.sft import LastAnswers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that torch's cross entropy ignores
MOST_ORDERS = 1000  # orders of a call's arguments that are tried: all of six arguments


@dataclass(frozen=True)
class Tokens:
    """Token ids of a sequence, and for each whether it counts in the loss."""

    input_ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> list[int]:
        return [token if trained else IGNORE_INDEX for token, trained in zip(self.input_ids, self.trained, strict=True)]


def tokenize(row: Row, tokenizer: PreTrainedTokenizerBase, train_on: str | LastAnswers = "assistant") -> Tokens:
    """Return the last of a row's sequences, which ends with its last answer; see `sequences`."""
    return sequences(row, tokenizer, train_on)[-1]


def sequences(row: Row, tokenizer: PreTrainedTokenizerBase, train_on: str | LastAnswers = "assistant") -> list[Tokens]:
    """Return the sequences to train on: one, or one per answer if no single text holds every answer as it was asked for.

    `train_on` is `completion` (the last answer), `assistant` (every assistant turn), `LastAnswers`, or `all`; plain text is
    always `all`.
    A turn of weight 0 is never trained on.
    Raises StageFailed(data) if the answer cannot be located in the rendered text.
    """
    if row.text is not None:
        ids = with_eos(tokenizer(row.text)["input_ids"], tokenizer)
        return [Tokens(ids, [True] * len(ids))]
    if row.messages is None:
        prompt = tokenizer(row.prompt)["input_ids"]
        if row.completion is None:
            return [Tokens(prompt, [train_on == "all"] * len(prompt))]
        completion = with_eos(tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer)
        return [Tokens(prompt + completion, [train_on == "all"] * len(prompt) + [True] * len(completion))]

    if train_on == "all":
        learnt = answers_to_learn(row)
        positions = [position for position in answers(row) if position not in learnt]
    else:
        positions = answers_to_learn(row, train_on)
    turns = [turn(row, position, tokenizer) for position in positions]
    text = turns[-1].text if positions and positions[-1] == len(row.messages) - 1 else conversation(row, tokenizer)
    whole = at_once(text, turns, tokenizer) if all(text.startswith(each.text) for each in turns) else None
    if train_on != "all":
        return [whole] if whole else [apart(each, tokenizer) for each in turns]
    if whole is None:
        message = f"the chat template renders row {row.id} so that its messages of weight 0 cannot be masked"
        raise StageFailed("data", message, "train on answers only (`train_on: assistant`)")
    return [Tokens(whole.input_ids, [not answer for answer in whole.trained])]


def answers(row: Row) -> list[int]:
    """Return the positions of the messages that are answers. A greeting before anybody else's first message is none."""
    assert row.messages is not None
    roles = [message["role"] for message in row.messages]
    return [position for position, role in enumerate(roles) if role == "assistant" and set(roles[:position]) - {"assistant"}]


def answers_to_learn(row: Row, train_on: str | LastAnswers = "assistant") -> list[int]:
    """Return the positions of the answers that are trained on: those of the wanted ones whose weight is not 0."""
    assert row.messages is not None
    every = answers(row)
    wanted = every[-train_on.last :] if isinstance(train_on, LastAnswers) else every[-1:] if train_on == "completion" else every
    return [position for position in wanted if row.messages[position].get("weight") != 0]


def at_once(text: str, turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """Build one sequence with every answer; None if a token spans the border of an answer."""
    ids, places = cut(text, [place for each in turns for place in (len(each.prompt), len(each.text))], tokenizer)
    if places is None:
        return None
    trained = [False] * len(ids)
    for first, last in zip(places[::2], places[1::2], strict=True):
        trained[first:last] = [True] * (last - first)
    return Tokens(ids, trained)


def cut(text: str, borders: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int] | None]:
    """Tokenize a text and count the tokens before each border: the begin and end of each answer. None in place of the counts if a token
    spans a border, or a prompt alone has other tokens: some tokenizers join the line ends at the end of a text only."""
    if not tokenizer.is_fast:  # slow tokenizers return no offsets
        ids, before = token_ids(text, tokenizer), [token_ids(text[:border], tokenizer) for border in borders]
        return ids, [len(each) for each in before] if all(ids[: len(each)] == each for each in before) else None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    starts, ends = ([offset[side] for offset in encoded["offset_mapping"]] for side in (0, 1))
    places = [bisect_left(starts, border) for border in borders]
    if any(ends[place - 1] > border for place, border in zip(places, borders, strict=True) if place):
        return ids, None
    special = _special(tokenizer, len(tokenizer))
    for place, border in zip(places[::2], borders[::2], strict=True):
        # A special token splits a text, so what follows the last one shows how the prompt ends.
        last = next((i for i in range(place - 1, -1, -1) if ids[i] in special), -1)
        tail = text[ends[last] if last >= 0 else 0 : border]
        if token_ids(tail, tokenizer) != ids[last + 1 : place] and token_ids(text[:border], tokenizer) != ids[:place]:
            return ids, None
    return ids, places


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    return frozenset({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})


def apart(one: Turn, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Build the sequence of one answer: the prompt's tokens as a server sends them, then those of the answer."""
    prompt, whole = token_ids(one.prompt, tokenizer), token_ids(one.text, tokenizer)
    ids, start = whole, len(prompt)
    if whole[:start] != prompt:
        ids = prompt + token_ids(one.answer, tokenizer)
        if tokenizer.decode(ids) != tokenizer.decode(whole):  # the tokenizer marks the beginning of any text, as SentencePiece may
            ids, start = whole, next(i for i in range(start) if whole[i] != prompt[i])
    return Tokens(ids, [False] * start + [True] * (len(ids) - start))


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the row's prompt as a server would send them; empty for plain text."""
    messages = row.prompt_messages()
    if messages is not None:
        return token_ids(render_text(messages, row, tokenizer, add_generation_prompt=True), tokenizer)
    return list(tokenizer(row.prompt)["input_ids"]) if row.prompt is not None else []


def prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids before the row's last answer, and the answer's, with the end of the turn. Raises StageFailed(data) if nothing
    of it is trained on."""
    tokens = tokenize(row, tokenizer, "completion")
    if not any(tokens.trained[1:]):
        raise StageFailed("data", f"row {row.id} has no token to train on: its answer is empty, or has weight 0", "remove the row")
    start = tokens.trained.index(True)
    end = len(tokens.trained) - tokens.trained[::-1].index(True)
    return tokens.input_ids[:start], tokens.input_ids[start:end]


def with_reference(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return the row with the right answer as its `answer`: its own `answer`, its completion, or the last answer as the model learns to
    write it, without eos token and thoughts. None if there is no such text, or it is not rendered or not trained on."""
    answer = row.reference()
    if row.answer is None and row.messages is not None and row.messages[-1]["role"] == "assistant":
        answer = None
        if row.messages[-1].get("weight") != 0 and row.label is not False:
            ids, start, end = last_answer(row, tokenizer, set(ends(tokenizer)))
            answer = said(written(ids[start:end], tokenizer, ()), tokenizer.decode(ids[:start]), tokenizer)
    return replace(row, answer=answer if answer and marks.said(answer) else None)


def in_the_order_of(row: Row, answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the model's answer with the arguments of its calls in the row's order, if nothing else differs, in any template's syntax.
    The row is one of `with_reference`."""
    assert row.messages is not None
    if answer == row.answer or row.answer is None or sorted(answer) != sorted(row.answer):
        return answer
    *before, last = row.messages
    for calls in islice(product(*map(orders, last["tool_calls"])), MOST_ORDERS):
        other = with_reference(replace(row, messages=(*before, last | {"tool_calls": [*calls]}), answer=None), tokenizer)
        if other.answer == answer:
            return row.answer
    return answer


def orders(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the call with its arguments in each order."""
    call = called(call, as_text=False)
    function = call.get("function", call)
    arguments = function["arguments"]
    for items in permutations(arguments.items()) if isinstance(arguments, dict) else ():
        function = function | {"arguments": dict(items)}
        yield call | {"function": function} if "function" in call else function


def last_answer(row: Row, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> tuple[list[int], int, int]:
    """Return the row's token ids, and where its last answer begins and ends (at the first of `ends`); both at the end if nothing is
    trained on."""
    tokens = tokenize(row, tokenizer, "completion")
    if not any(tokens.trained):
        return tokens.input_ids, len(tokens.input_ids), len(tokens.input_ids)
    start = tokens.trained.index(True)
    last = max(place for place, trained in enumerate(tokens.trained) if trained) + 1
    return tokens.input_ids, start, next((i for i in range(start, last) if tokens.input_ids[i] in ends), last)


def token_counts(rows: list[Row], tokenizer: PreTrainedTokenizerBase, texts: list[str] | None = None) -> list[int]:
    """Count the tokens of each row's longest sequence. Much faster than `sequences`: tokenizes rows together and locates no turns.
    `texts` are the conversations' texts, if already rendered."""

    def batch(texts: list[str | None], add_special_tokens: bool) -> Iterator[list[int]]:
        return iter(tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else [])

    plain = [row for row in rows if row.messages is None]
    if texts is None:
        texts = [conversation(row, tokenizer) for row in rows if row.messages is not None]
    conversations = batch([*texts], False)
    beginnings = batch([row.prompt if row.text is None else row.text for row in plain], True)
    completions = batch([row.completion for row in plain if row.completion is not None], False)
    counts = []
    for row in rows:
        if row.messages is not None:
            counts.append(len(next(conversations)))
        elif row.text is not None:
            counts.append(len(with_eos(next(beginnings), tokenizer)))
        elif row.completion is not None:
            counts.append(len(next(beginnings)) + len(with_eos(next(completions), tokenizer)))
        else:
            counts.append(len(next(beginnings)))
    return counts


def with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(ids) if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
