"""Which tokens of a row are trained on, decided once for training, samples, calibration and scoring.

A turn's span is found by tokenizing the conversation up to it with the generation prompt, as a server would, and *checking*
that this is a prefix of the whole; where a template breaks that, the row is refused instead of being trained on the wrong
tokens. TRL's own masks are not used: `assistant_only_loss` needs `{% generation %}` marks that few templates have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.rows import Row
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Tokens:
    """Token ids of a row, and for each whether it counts in the loss."""

    input_ids: list[int]
    trained: list[bool]

    @property
    def labels(self) -> list[int]:
        return [token if trained else IGNORED for token, trained in zip(self.input_ids, self.trained, strict=True)]


def tokenize(row: Row, tokenizer: PreTrainedTokenizerBase, train_on: str = "assistant") -> Tokens:
    """`train_on` is `completion` (the last answer), `assistant` (every assistant turn) or `all`; plain text is always `all`.

    A turn of weight 0 is never trained on.

    Raises StageFailed(data) where the template renders a conversation so that an answer's beginning cannot be told.
    """
    if row.text is not None:
        ids = with_eos(tokenizer(row.text)["input_ids"], tokenizer)
        return Tokens(ids, [True] * len(ids))
    if row.messages is None:
        prompt = tokenizer(row.prompt)["input_ids"]
        if row.completion is None:
            return Tokens(prompt, [train_on == "all"] * len(prompt))
        completion = with_eos(tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer)
        return Tokens(prompt + completion, [train_on == "all"] * len(prompt) + [True] * len(completion))

    ids = render(row.messages, row, tokenizer)
    trained = [train_on == "all"] * len(ids)
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    silent = {i for i in answers if row.messages[i].get("weight") == 0}
    turns = {"assistant": [i for i in answers if i not in silent], "completion": [i for i in answers[-1:] if i not in silent]}
    for turn in turns.get(train_on, sorted(silent)):
        start = render(row.messages[:turn], row, tokenizer, add_generation_prompt=True)
        end = render(row.messages[: turn + 1], row, tokenizer)
        if ids[: len(start)] != start or ids[: len(end)] != end:
            raise StageFailed(
                "data",
                f"the chat template renders row {row.id} so that the beginning of message {turn} changes with what follows it",
                "train on the last answer alone (`train_on: completion`), or split the conversation into rows",
            )
        trained[len(start) : len(end)] = [train_on != "all"] * (len(end) - len(start))
    return Tokens(ids, trained)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the row's prompt as a server would send it to the model; empty for plain text."""
    messages = row.prompt_messages()
    if messages is not None:
        return render(messages, row, tokenizer, add_generation_prompt=True)
    return list(tokenizer(row.prompt)["input_ids"]) if row.prompt is not None else []


def token_counts(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """len(tokenize(row).input_ids) of every row, several times as fast: tokenized together, and no turn is looked for."""

    def batch(texts: list[str | None], add_special_tokens: bool) -> Iterator[list[int]]:
        return iter(tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else [])

    plain = [row for row in rows if row.messages is None]
    conversations = batch([render_text(row.messages, row, tokenizer) for row in rows if row.messages is not None], False)
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


def render(messages: Any, row: Row, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> list[int]:
    text = render_text(messages, row, tokenizer, add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_text(messages: Any, row: Row, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        hint = "use an instruct model, or rows of plain text"
        raise StageFailed("data", "the model has no chat template, but rows are conversations", hint)
    from jinja2 import TemplateError  # comes with transformers

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=row.extra.get("tools"), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # the template's own refusal, as of a system prompt, or whatever its code raises on this row
        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise StageFailed("data", f"the chat template refuses row {row.id}: {why}", "change the rows, or take another model") from error


def with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(ids) if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
