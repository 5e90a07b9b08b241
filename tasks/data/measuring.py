"""Measures the rows of a Dataset: counts their tokens, gives each its id and group, and drops, truncates or refuses long ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tasks.data.formats import refuse_row
from tasks.data.masks import answers_to_learn, token_counts
from tasks.data.rendering import conversation, turn
from tasks.data.rows import Row, content_hash
from tasks.data.sources import Counts, Item, drop
from tasks.data.unrendered import HINT, lost_in_rejected, unrendered
from tasks.data.values import BadRow
from tasks.models.loading import template_hash
from tuneline.errors import StageFailed
from tuneline.kinds.dataset import DatasetStage
from tuneline.workspace.protocol import Events

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 2000  # rows tokenized together, and between two progress events


def identified(row: Row) -> Row:
    """Return the row with its id and, unless its source gave one, its group."""
    try:
        named = replace(row, id=content_hash(row.content()), group=row.group or group_of(row))
        vars(named)["stored_extra"] = row.stored_extra
        return named
    except (TypeError, ValueError, RecursionError) as error:
        refuse_row(row)
        raise BadRow("found lists and objects nested too deeply to be compared, expected a few hundred") from error


def group_of(row: Row) -> str:
    """Hash the prompt: the messages before the first answer, so that a conversation and its continuation stay in one split. System
    prompts do not count: the same question is the same group."""
    if row.text is not None:
        return content_hash(row.text)
    prompt = opening(row.messages) if row.messages is not None else ({"role": "user", "content": row.prompt},)
    return content_hash([message for message in prompt if message["role"] != "system"])


def opening(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return the messages before the first answer to a user: some conversations begin with a greeting."""
    roles = [message["role"] for message in messages]
    asked = roles.index("user") if "user" in roles else 0
    return messages[: roles.index("assistant", asked)] if "assistant" in roles[asked:] else messages


def measured(items: list[Item], stage: DatasetStage, tokenizer: PreTrainedTokenizerBase, counts: Counts, events: Events) -> Iterator[Item]:
    """Count tokens. Drops, truncates or refuses rows over max_length, as the stage says."""
    steps = len(stage.sources) + 3
    known: set[Any] = set()
    for start in range(0, len(items), BATCH):
        batch, texts = rendered(items[start : start + BATCH], stage, tokenizer, known, counts, events)
        events.progress(steps - 3, steps, f"counted tokens of {start:,} of {len(items):,} rows")
        counted = iter(token_counts([row for item in batch for row in item.row.alternatives()], tokenizer, texts))
        for item in batch:
            tokens = max(next(counted) for _ in item.row.alternatives())
            if stage.max_length is None or tokens <= stage.max_length:
                yield replace(item, tokens=tokens)
            elif stage.over_long == "drop":
                counts.fates["over_long", item.row.source] += 1
            elif stage.over_long == "truncate" and item.row.text is not None:
                counts.fates["truncated", item.row.source] += 1
                yield truncated(item, tokenizer, stage.max_length)
            else:
                why = ": only plain text can be truncated" if stage.over_long == "truncate" else ""
                message = f"{item.place}: found a row of {tokens} tokens, expected {stage.max_length}{why}"
                raise StageFailed("data", message, "shorten it, raise max_length, or set `over_long: drop`")


def rendered(
    items: list[Item], stage: DatasetStage, tokenizer: PreTrainedTokenizerBase, known: set[Any], counts: Counts, events: Events
) -> tuple[list[Item], list[str]]:
    """Return the items, without those dropped because the template leaves out part of them, and the conversations' texts, two of a pair."""
    kept: list[Item] = []
    texts: list[str] = []
    for item in items:
        row = item.row
        if row.messages is not None:
            both = row.alternatives()
            try:
                written = [conversation(each, tokenizer) for each in both]
                for each in both:
                    check_turns(each, tokenizer, known)
            except StageFailed as error:
                if tokenizer.chat_template is None:
                    raise
                source = stage.sources[int(row.source.split(".")[1])]
                drop(BadRow(error.message, error.hint), item.place, row.source, source, counts, events)
                continue
            missing = unrendered(both[0], written[0], tokenizer)
            for each, text in zip(both[1:], written[1:], strict=True):
                missing += lost_in_rejected(each, text, tokenizer)
            if missing:
                message = f"{item.place}: the chat template (sha256 {str(template_hash(tokenizer))[:12]}) leaves out {', '.join(missing)}"
                if stage.on_unrendered == "error":
                    raise StageFailed("data", message, HINT)
                fate = "unrendered" if stage.on_unrendered == "drop" else "kept_unrendered"
                if not counts.total(fate):
                    what = "dropped" if stage.on_unrendered == "drop" else "kept"
                    events.warning(f"rows of which the chat template leaves out a part are {what}, the first is {message}")
                counts.fates[fate, row.source] += 1
                if stage.on_unrendered == "drop":
                    continue
            texts += written
        kept.append(item)
    return kept, texts


def check_turns(row: Row, tokenizer: PreTrainedTokenizerBase, known: set[Any]) -> None:
    """Raises StageFailed(data) if an answer to train on cannot be found in the rendered text. A template treats rows with one answer,
    and the same roles and fields, alike, so only the first of each shape in `known` is checked."""
    assert row.messages is not None
    shape = ("tools" in row.extra, *((*tuple(message), message["role"]) for message in row.messages))
    if shape in known:
        return
    positions = answers_to_learn(row)
    for position in positions:
        turn(row, position, tokenizer)
    if len(positions) == 1:
        known.add(shape)


def truncated(item: Item, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Item:
    """Cut the text before the first token over the limit, and again if the shorter text has more tokens than expected."""
    text = item.row.text or ""
    tokens = token_counts([item.row], tokenizer)[0]
    row = item.row
    while tokens > max_length:
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        text = text[: offsets[len(offsets) - (tokens - max_length)][0]]
        row = replace(row, text=text)
        tokens = token_counts([row], tokenizer)[0]
    if not text.strip():
        raise StageFailed("data", f"{item.place}: found no text within {max_length} tokens", "raise max_length")
    return Item(item.place, identified(row), tokens)
