"""Handles special tokens of a model that are written in the text of a row: a tokenizer would read them as the real tokens.

A message that contains `<|im_end|>` would end its turn there, and could continue with a turn of another role. So rows with such
text are refused; a dataset may escape it, or keep it where it is intended (`special_tokens`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tasks.data.rows import Row
from tasks.data.values import BadRow
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HINT = "remove it, or set `special_tokens` in the dataset's stage: `escape` writes a space into it, `keep` lets it be the real token"


def pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Return a pattern for every special token of the tokenizer, the longest first; None if it has none."""
    tokens = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens))
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))) if tokens else None


def treated(row: Row, special: re.Pattern[str], treatment: str) -> Row:
    """Return the row as its stage's `special_tokens` says. Raises BadRow for `error`."""
    found = first(row, special)
    if found is None:
        return row
    if treatment == "error":
        raise BadRow(f"found the special token {found} written out in the text", HINT)
    if treatment == "keep":
        return replace(row, extra=row.extra | {"special_tokens": "keep"})
    return escaped(row, special)


def refuse(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StageFailed(data) for a row with a special token unless its stage keeps them. A dataset made without this model may have
    some."""
    special = pattern(tokenizer)
    if special is None:
        return
    for row in rows:
        found = first(row, special) if "special_tokens" not in row.extra else None
        if found is not None:
            hint = HINT + "; its stage needs the model for that: `model: base`"
            raise StageFailed("data", f"row {row.id}: found the special token {found} written out in the text", hint)


def first(row: Row, special: re.Pattern[str]) -> str | None:
    found = special.search(everything(row))
    return found.group() if found else None


def everything(row: Row) -> str:
    """Return all text of the row that is tokenized."""
    if row.rejected is not None:
        return "\n".join(map(everything, row.alternatives()))
    if row.messages is None:
        return f"{row.prompt or ''}\n{row.completion or ''}\n{row.text or ''}"
    parts = []
    for message in row.messages:
        parts += [message["content"] or "", *(_json(value) for name, value in message.items() if name not in ("role", "content"))]
    if "tools" in row.extra:
        parts.append(_json(row.extra["tools"]))
    return "\n".join(parts)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def escaped(row: Row, special: re.Pattern[str]) -> Row:
    """Return the row with a space after the first character of every special token: `< |im_end|>`."""

    def written(value: str) -> str:
        while special.search(value):  # the result may contain another special token
            value = special.sub(lambda token: f"{token.group()[0]} {token.group()[1:]}", value)
        return value

    messages = row.messages and tuple(_mapped(message, written) for message in row.messages)
    extra = row.extra | {"tools": _mapped(row.extra["tools"], written)} if "tools" in row.extra else row.extra
    texts: dict[str, Any] = {
        name: written(value) for name in ("prompt", "completion", "text", "answer") if (value := getattr(row, name)) is not None
    }
    if row.rejected is not None:
        texts["rejected"] = _mapped(row.rejected, written)
    return replace(row, messages=messages, extra=extra, **texts)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(item, change) for name, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
