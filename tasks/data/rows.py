"""Defines rows of a Dataset, the form in which programs pass them on, and reads and writes the parquet files that hold them.

A row is a conversation (`messages`), a `prompt` with its `completion`, or plain `text`. `answer` is the right answer; `extra` is a
JSON object (the scorer's entry of reasoning-gym, `tools` for the template, `tests` and more for rewards). A row for rewards only
has no completion: its conversation ends with the user. A pair for preference training ends with the chosen answer, and has the other
one as `rejected`; `label` says of a single answer whether it is desirable. A message has `role` and `content`, and may have
`tool_calls`, `name`, `tool_call_id`, `reasoning_content`, `thinking`, and `weight`: 0 for an answer that is not trained on.
"""

from __future__ import annotations

import gc
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuneline.errors import StageFailed

SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "group", "source", "messages", "prompt", "completion", "text", "answer", "extra")
PREFERENCES = ("rejected", "label")  # JSON; a file has these columns only if one of its rows has such a value
PARTS = ("role", "content", "tool_calls")  # of a message; tool_calls: JSON
THOUGHTS = ("reasoning_content", "thinking")  # of a message; if it has one, transformers gives templates both
MORE = "more"  # JSON of a message's other fields; a file has this part only if one of its messages has such fields
_STORED = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


UNASKED = ("scorer", "special_tokens")  # names in `extra` that do not belong to a row's content


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Run the garbage collector less often: rows are in no cycles, but it would traverse all of them again and again, for a quarter
    of the time if they have tools."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(frozen=True)
class Row:
    source: str
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    answer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    id: str = ""
    rejected: dict[str, Any] | str | None = None
    """The answer that is worse than the row's own: a message, or a completion."""
    label: bool | None = None
    """Whether the row's answer is desirable."""

    def content(self) -> str:
        """Return canonical JSON of what a model sees and is asked for: equal rows, equal ids.

        Ignores whitespace at line ends and around each text, and Unicode's different forms of accents. An `answer` counts if the row
        does not end with it, and so does all of `extra` except the scorer's entry, which numbers its rows.
        """
        document: dict[str, Any] = {"messages": self.messages, "prompt": self.prompt, "completion": self.completion, "text": self.text}
        if self.text is None:
            last = self.messages[-1] if self.messages else {}
            said = last["content"] if last.get("role") == "assistant" else self.completion
            document["answer"] = self.answer if self.answer != said else None
            extra = {name: value for name, value in self.extra.items() if name not in UNASKED}
            stored = self.stored_extra if len(extra) == len(self.extra) else _STORED.encode(extra)
            document["extra"] = _canonical_text(stored) if extra else None
        return _canonical(document | {"rejected": self.rejected, "label": self.label})  # absent values do not count

    @cached_property
    def stored_extra(self) -> str:
        """Return `extra` as it is stored: JSON in the order of its keys."""
        return _STORED.encode(self.extra)

    def asked(self) -> str:
        """Return canonical JSON of all that comes before the answer: equal for rows that differ only in the answer."""
        return _canonical({"messages": self.prompt_messages(), "prompt": self.prompt, "text": self.text})

    def prompt_messages(self) -> tuple[dict[str, Any], ...] | None:
        """Return the conversation up to the answer that it ends with; None if the row is no conversation."""
        if self.messages is None or self.messages[-1]["role"] == "user":
            return self.messages
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "assistant"), default=len(self.messages))
        return self.messages[:last]

    def alternatives(self) -> tuple[Row, ...]:
        """Return the row with each of its answers: of a pair the chosen one, then the rejected one."""
        if self.rejected is None:
            return (self,)
        chosen = replace(self, rejected=None)
        if isinstance(self.rejected, str):
            return chosen, replace(chosen, completion=self.rejected)
        assert self.messages is not None
        return chosen, replace(chosen, messages=(*self.messages[:-1], self.rejected))

    def calls(self) -> bool:
        """Return whether the right answer calls tools."""
        return self.messages is not None and bool(self.messages[-1].get("tool_calls"))

    def reference(self) -> str | None:
        """Return the right answer: `answer`, else the completion or the last assistant turn; None for plain text, and if the answer is
        not desirable."""
        if self.answer is not None:
            return self.answer
        if self.label is False:
            return None
        if self.messages is not None and self.messages[-1]["role"] == "assistant":
            content: str | None = self.messages[-1]["content"]  # None where the turn only calls tools
            return content
        return self.completion


def tidy(value: Any) -> Any:
    """Return `value` with every text in it in one form (NFC), without whitespace at line ends and around it."""
    if isinstance(value, str):
        value = value.strip()
        if not value.isascii():
            value = unicodedata.normalize("NFC", value)
        return value if value.isprintable() else "\n".join([line.rstrip() for line in value.splitlines()])  # printable text is one line
    if isinstance(value, dict):
        return {_one_form(key): tidy(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return value


def _one_form(key: Any) -> Any:
    return key if not isinstance(key, str) or key.isascii() else unicodedata.normalize("NFC", key)


def _canonical(value: Any) -> str:
    return _CANONICAL.encode(tidy(value))


@lru_cache(maxsize=1000)  # most rows of a dataset have the same tools
def _canonical_text(text: str) -> str:
    return _canonical(json.loads(text))


def content_hash(value: Any) -> str:
    """Return the first 16 hex digits of the sha256 of the tidied, canonical JSON of `value`."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


def write_rows(rows: list[Row], path: Path) -> None:
    """Write parquet in row order, without statistics of time or host: the same rows give the same bytes.

    Calls, schemas and other objects keep the order of their keys: a template renders it.
    """
    records = []
    for row in rows:
        record = {name: getattr(row, name) for name in COLUMNS}
        messages = row.messages and [_stored(message) for message in row.messages]
        more = {name: _STORED.encode(value) for name in PREFERENCES if (value := getattr(row, name)) is not None}
        records.append(record | {"messages": messages, "extra": row.stored_extra} | more)
    parts = (*PARTS, MORE) if any(MORE in message for record in records for message in record["messages"] or ()) else PARTS
    message = pa.struct([(name, pa.string()) for name in parts])
    columns = (*COLUMNS, *(name for name in PREFERENCES if any(name in record for record in records)))
    schema = pa.schema([(name, pa.list_(message) if name == "messages" else pa.string()) for name in columns])
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path, compression="zstd")


def _stored(message: dict[str, Any]) -> dict[str, str | None]:
    calls = message.get("tool_calls")
    stored = {"role": message["role"], "content": message.get("content"), "tool_calls": json.dumps(calls) if calls else None}
    more = {name: value for name, value in message.items() if name not in PARTS} if len(message) > 2 else None
    return stored | {MORE: _STORED.encode(more)} if more else stored


def read_rows(path: Path, positions: Sequence[int] | None = None) -> list[Row]:
    """Read the rows of a file, all of them or those at `positions`."""
    table = pq.read_table(path)
    rows = []
    for record in (table if positions is None else table.take(positions)).to_pylist():
        messages = record.pop("messages")
        if messages is not None:
            messages = tuple(
                {"role": m["role"], "content": m["content"]}
                | ({"tool_calls": json.loads(m["tool_calls"])} if m["tool_calls"] else {})
                | (json.loads(m[MORE]) if m.get(MORE) else {})
                for m in messages
            )
        more = {name: json.loads(record[name]) for name in PREFERENCES if record.get(name) is not None}
        rows.append(Row(**{**record, "messages": messages, "extra": json.loads(record["extra"]), **more}))
    return rows


def row_count(path: Path) -> int:
    """Count the rows of a parquet file by its footer."""
    return int(pq.read_metadata(path).num_rows)


def read_split(payload: Path, split: str) -> list[Row]:
    """Read the rows of one split of a Dataset's payload, in their stored order.

    Raises StageFailed(data) if a group is also in another split: a model would be measured on what it was trained on.
    """
    rows = read_rows(payload / f"{split}.parquet")
    groups = {row.group for row in rows}
    for other in SPLITS:
        column = pq.read_table(payload / f"{other}.parquet", columns=["group"])["group"]
        shared = groups & set(column.unique().to_pylist()) if other != split else set()
        if shared:
            message = f"{len(shared)} groups of rows are in the dataset's {split} split and in its {other} split, such as {min(shared)}"
            raise StageFailed("data", message, "force the dataset's stage: its splits share no group")
    return rows
