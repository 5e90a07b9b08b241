"""Reads the sources of a Dataset: every row with its place, so that an error names file and line. `readers.py` opens files.

A row that cannot be read ends the stage, or is dropped and counted, as its source says (`on_bad_row`); a problem of a whole file
always ends the stage. Left out on purpose: loading scripts of hub repositories (they run code), and any repair of broken rows.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.data.code import Selected, code_rows
from tasks.data.formats import KNOWN, detect, to_row
from tasks.data.readers import Records, file_records, plain
from tasks.data.rows import Row
from tasks.data.values import BadRow, describe, readable
from tuneline.errors import StageFailed
from tuneline.kinds.sources import CodeSource, FilesSource, HubSource, ReasoningGymSource
from tuneline.workspace.protocol import Events, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnySource = FilesSource | HubSource | ReasoningGymSource | CodeSource


@dataclass(frozen=True)
class Item:
    """A row, where it was read, and its number of tokens (0 if no model counts them)."""

    place: str
    row: Row
    tokens: int = 0


@dataclass(frozen=True)
class Counts:
    """Counts what happened to rows."""

    read: Counter[str] = field(default_factory=Counter)
    """By source."""
    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By fate (`bad_rows`, `duplicates`, `over_long`: dropped; `truncated`: kept) and source."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Values that no format reads, by column or field of a message."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files, folders and chunks of source trees that were not read, by reason."""

    def total(self, fate: str) -> int:
        return sum(count for (name, _), count in self.fates.items() if name == fate)


def read_source(
    request: Request, index: int, source: AnySource, tokenizer: PreTrainedTokenizerBase | None, counts: Counts, events: Events
) -> Iterator[Item]:
    """Yield rows in the order of the source, and count those read, dropped and ignored.

    A row's `source` is its position in the stage: a file's name may change without changing the key.
    """
    name = f"sources.{index}"
    for item in items_of(request, index, source, tokenizer, counts, events):
        counts.read[name] += 1
        if item is not None:
            yield item


def items_of(
    request: Request, index: int, source: AnySource, tokenizer: PreTrainedTokenizerBase | None, counts: Counts, events: Events
) -> Iterator[Item | None]:
    """Yield each row of a source; None for a dropped row."""
    name = f"sources.{index}"
    if isinstance(source, ReasoningGymSource):
        yield from gym_rows(name, source, request.seed + 1_000_000 * index)  # the library draws row i with seed + i
        return
    if isinstance(source, CodeSource):
        assert tokenizer is not None  # the stage names a model
        tree, files = request.trees[f"{name}.path"], request.files[f"{name}.path"]
        counts.left_out.update(tree.left_out)
        for place, row in code_rows(Selected(name, source, tree.folder, files), tokenizer, request.seed, counts.left_out):
            yield Item(place, row)
        return
    unknown = sorted(source.columns.keys() - KNOWN)
    if unknown:
        message = f"{name}.columns: found {', '.join(unknown)}, expected {', '.join(sorted(KNOWN))}"
        raise StageFailed("config", message, "tuneline's name comes first, then the file's")
    if isinstance(source, HubSource):
        yield from rows_of(hub_records(name, source, request.commits[f"{name}.repo"]), name, source, counts, events)
        return
    files = request.files[f"{name}.path"]
    if not files:
        raise StageFailed("data", f"{name}.path: no file matches {source.path}", "paths are relative to pipelines.yaml")
    for file in files:
        yield from rows_of(file_records(file), name, source, counts, events)


def rows_of(records: Records, name: str, source: FilesSource | HubSource, counts: Counts, events: Events) -> Iterator[Item | None]:
    """Yield the rows of one file. The first readable row decides the format of the whole file."""
    row_format: str = source.format
    absent: list[str] | None = None
    for place, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, dict):
                raise BadRow(f"found {describe(record)}, expected an object")
            readable(record)
            if absent is None and (absent := sorted(set(source.columns.values()) - record.keys())):
                message = f"{place}: found columns {', '.join(record)}, but {name}.columns names {', '.join(absent)}"
                raise StageFailed("data", message, "tuneline's name comes first, then the file's")
            record = {column: value for column, value in renamed(record, source.columns).items() if value is not None}
            row_format = detect(record) if row_format == "auto" else row_format
            yield Item(place, to_row(record, row_format, name, counts.ignored))
        except BadRow as error:
            drop(error, place, name, source, counts, events)
            yield None


def drop(error: BadRow, place: str, name: str, source: AnySource, counts: Counts, events: Events) -> None:
    """Count the row as dropped if its source allows that, else raise StageFailed(data). Warns of each source's first dropped row."""
    if not isinstance(source, FilesSource | HubSource):
        raise StageFailed("data", f"{place}: {error.message}", error.hint) from error
    if source.on_bad_row == "error":
        hint = error.hint or "fix or remove the row, or set `on_bad_row: drop` in its source"
        raise StageFailed("data", f"{place}: {error.message}", hint) from error
    if not counts.fates["bad_rows", name]:
        hint = f" ({error.hint})" if error.hint else ""
        events.warning(f"rows that cannot be read are dropped, the first at {place}: {error.message}{hint}")
    counts.fates["bad_rows", name] += 1


def renamed(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    moved = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    return {name: value for name, value in record.items() if name not in columns and name not in columns.values()} | moved


# --- hub and generator ------------------------------------------------------------------------------------------------


def hub_records(name: str, source: HubSource, commit: str) -> Records:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        data = load_dataset(source.repo, name=source.subset, split=source.split, revision=commit)
    except DatasetNotFoundError:  # or no access: classified with the hub's other errors
        raise
    except (ValueError, RuntimeError, DatasetsError) as error:  # unknown subset or split, a loading script, broken files
        raise StageFailed("data", f"{name}: {source.repo}: {error}", "check subset and split; loading scripts are never run") from error
    shown = plain(data.features.arrow_schema)
    for number, record in enumerate(data, 1):
        yield f"{source.repo}: row {number}", shown(record)


def gym_rows(name: str, source: ReasoningGymSource, seed: int) -> Iterator[Item]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        near = difflib.get_close_matches(source.task, DATASETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(DATASETS))}"
        raise StageFailed("config", f"{name}.task: found {source.task}, expected a dataset of reasoning-gym", hint)
    try:
        data = reasoning_gym.create_dataset(source.task, seed=seed, size=source.size, **source.config)
    except (TypeError, AssertionError, ValueError) as error:
        known = ", ".join(field for field in DATASETS[source.task][1].__dataclass_fields__ if field not in ("seed", "size"))
        raise StageFailed("config", f"{name}.config: {source.task}: {error}", f"expected some of {known}") from error
    for number in range(source.size):
        entry = data[number]
        if not isinstance(entry["answer"], str):
            raise StageFailed("config", f"{name}.task: {source.task} gives no answer to learn from", "use a task with one right answer")
        written = json.loads(json.dumps(entry, sort_keys=True))
        if number == 0 and data.score_answer(entry["answer"], written) != data.score_answer(entry["answer"], entry):
            raise StageFailed("config", f"{name}.task: {source.task} cannot be scored once its rows are written", "use another task")
        messages = ({"role": "user", "content": entry["question"]}, {"role": "assistant", "content": entry["answer"]})
        extra = {"scorer": {"dataset": source.task, "entry": written}}
        yield Item(f"{source.task}: row {number + 1}", Row(name, messages=messages, answer=entry["answer"], extra=extra))
