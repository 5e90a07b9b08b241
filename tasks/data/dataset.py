"""Builds a Dataset: reads every source, drops rows that are too long or duplicates, splits by group, and writes a report.

    read -> measure (drop, truncate or refuse rows over max_length) -> deduplicate -> max_rows -> split -> check -> repeat or weight ->
    write -> report

A row's *group* decides its split: the bucket of hash(seed, group), so adding rows never moves a group, and rows with the same
prompt are never in two splits. Left out on purpose: fuzzy deduplication, and shuffling (the trainer's sampler shuffles); rows keep
the order in which they were read.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.data import special_tokens
from tasks.data.measuring import BATCH, identified, measured, opening
from tasks.data.mixing import limited, mixed
from tasks.data.report import ignored, write_report
from tasks.data.rows import SPLITS, Row, row_count, seldom_collected, tidy, write_rows
from tasks.data.sources import AnySource, Counts, Item, drop, read_source
from tasks.data.values import BadRow
from tasks.models.licenses import of_repository
from tasks.models.loading import load_tokenizer
from tuneline.errors import StageFailed
from tuneline.kinds.dataset import DatasetStage, Split
from tuneline.kinds.sources import CodeSource, HubSource
from tuneline.workspace.protocol import Events, Request, Result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = {
    "bad_rows": "could not be read", "duplicates": "are duplicates", "over_long": "are over max_length",
    "unrendered": "are not rendered completely", "not_drawn": "are not drawn",
}  # fmt: skip
DROPPED = tuple(WORDS)
MIN_ROWS = 10  # of 9 rows, a share of right answers has a standard error of up to 0.17


@seldom_collected()
def run(request: Request, stage: DatasetStage, events: Events) -> Result:
    tokenizer = load_tokenizer(request.inputs["model"]) if stage.model is not None else None
    counts = Counts()
    steps = len(stage.sources) + 3

    items = list(read(request, stage, tokenizer, counts, events))
    for message in unclear(items):
        events.warning(message)
    if tokenizer is not None:
        items = list(measured(items, stage, tokenizer, counts, events))
    events.progress(steps - 2, steps, "splitting")
    items = limited(list(deduplicated(items, stage.dedup, counts)), stage.sources, request.seed, counts)
    splits = split(items, stage.split, request.seed)
    check(splits, stage.split, counts)
    splits["train"] = mixed(splits["train"], stage.sources, request.seed, counts)
    check_mixed(splits["train"], stage)
    events.progress(steps - 1, steps, "writing")
    for name in SPLITS:
        file = request.payload / f"{name}.parquet"
        write_rows([item.row for item in splits[name]], file)
        if (written := row_count(file)) != len(splits[name]):
            raise StageFailed("bug", f"{file.name}: found {written} rows, expected {len(splits[name])}", "please report this")
    if kept := counts.total("kept_unrendered"):
        events.warning(f"{kept} of {counts.read.total()} rows are kept although the chat template leaves out part of them")
    for message in warnings(items, splits, stage, counts):
        events.warning(message)
    figures = write_report(request, stage, splits, counts, tokenizer, events)
    events.progress(steps, steps, f"wrote {len(items):,} rows")
    return Result(
        metrics={
            "rows_read": counts.read.total(),
            **{f"rows_{name}": len(splits[name]) for name in SPLITS},
            **{fate: counts.total(fate) for fate in (*WORDS, "truncated")},
            "groups": len({item.row.group for item in items}),
            **figures,
        },
        info={"licenses": licenses(request, stage)},
    )


def licenses(request: Request, stage: DatasetStage) -> dict[str, dict[str, str]]:
    """Return the licenses of sources on the hub, by source, for model cards."""
    repositories = {f"sources.{i}": source.repo for i, source in enumerate(stage.sources) if isinstance(source, HubSource)}
    found = {name: of_repository(repo, "dataset", request.commits[f"{name}.repo"]) for name, repo in repositories.items()}
    return {name: license for name, license in found.items() if license}


# --- read ------------------------------------------------------------------------------------------------------------


def read(
    request: Request, stage: DatasetStage, tokenizer: PreTrainedTokenizerBase | None, counts: Counts, events: Events
) -> Iterator[Item]:
    special = special_tokens.pattern(tokenizer) if tokenizer is not None else None
    for index, source in enumerate(stage.sources):
        events.progress(index, len(stage.sources) + 3, f"reading sources.{index}")
        for number, item in enumerate(read_source(request, index, source, tokenizer, counts, events), 1):
            try:
                row = with_system(item.row, system_of(source, stage))
                if special is not None and not isinstance(source, CodeSource):  # code sources leave them out themselves
                    row = special_tokens.treated(row, special, stage.special_tokens)
                yield Item(item.place, identified(row))
            except BadRow as error:
                drop(error, item.place, item.row.source, source, counts, events)
            if number % (10 * BATCH) == 0:
                events.progress(index, len(stage.sources) + 3, f"read {number:,} rows of sources.{index}")


def system_of(source: AnySource, stage: DatasetStage) -> str | None:
    """Return the system prompt of a source: its own, or the stage's. An empty one of its own is none."""
    own = None if isinstance(source, CodeSource) else source.system
    return stage.system if own is None else own or None


def with_system(row: Row, system: str | None) -> Row:
    if system is None or row.messages is None or row.messages[0]["role"] == "system":
        return row
    return replace(row, messages=({"role": "system", "content": system}, *row.messages))


# --- deduplicate and split --------------------------------------------------------------------------------------------


def deduplicated(items: list[Item], by: str, counts: Counts) -> Iterator[Item]:
    """Keep the first of rows with equal content (`content`) or equal prompts (`prompt`)."""
    seen: set[str] = set()
    for item in items:
        what = item.row.asked() if by == "prompt" else item.row.id
        if by != "none" and what in seen:
            counts.fates["duplicates", item.row.source] += 1
        else:
            seen.add(what)
            yield item


def bucket(seed: int, group: str) -> float:
    """Map a group to [0, 1), by the seed and the group only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:6], "big") / 2**48


def split(items: list[Item], shares: Split, seed: int) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {name: [] for name in SPLITS}
    for item in items:
        place = bucket(seed, item.row.group)
        name = "test" if place < shares.test else "validation" if place < shares.test + shares.validation else "train"
        splits[name].append(item)
    return splits


def check(splits: dict[str, list[Item]], shares: Split, counts: Counts) -> None:
    """Raises StageFailed if a group is in two splits, a row was lost, or a requested split is empty."""
    home: dict[str, str] = {}
    for name, items in splits.items():
        for item in items:
            if home.setdefault(item.row.group, name) != name:
                raise StageFailed("bug", f"group {item.row.group} is in {home[item.row.group]} and in {name}", "please report this")
    kept = sum(map(len, splits.values()))
    if counts.read.total() != kept + sum(map(counts.total, DROPPED)):
        raise StageFailed("bug", f"rows were lost: {kept} are left of {counts}", "please report this")
    for name, share in (("train", 1.0), ("validation", shares.validation), ("test", shares.test)):
        if share > 0 and not splits[name]:
            fates = [f"{total} {WORDS[fate]}" for fate in DROPPED if (total := counts.total(fate))]
            message = f"the {name} split is empty: {kept} rows in {len(home)} groups are left of {counts.read.total()} that were read"
            message += f" ({', '.join(fates)})" if fates else ""
            hint = "add rows; the warnings name the first dropped row" if fates else "add rows"
            if name != "train":
                hint = f"add rows, raise split.{name}, or set it to 0"
            if len(home) == 1 < kept:
                hint = "rows with the same first prompt stay together: put what all of them share into the system prompt"
            raise StageFailed("data", message, hint)


def check_mixed(train: list[Item], stage: DatasetStage) -> None:
    """Raises StageFailed if a source with a weight has no row in the train split."""
    used = {item.row.source for item in train}
    for index, source in enumerate(stage.sources):
        if source.weight and f"sources.{index}" not in used:
            message = f"sources.{index}: found a weight of {source.weight:g}, but no row of it in the train split"
            raise StageFailed("data", message, "raise the weight, add rows, or remove the source")


def unclear(items: list[Item]) -> Iterator[str]:
    """Warn of prompts with differing answers. Looks at all rows, also those that are dropped later."""
    answers: dict[str, set[str | None]] = defaultdict(set)
    for item in items:
        if item.row.rejected is not None or item.row.label is not None:
            continue  # several answers to a prompt are what preferences are about
        if item.row.messages is None or item.row.prompt_messages() == opening(item.row.messages):
            answers[item.row.group].add(tidy(item.row.reference()))
    differing = [group for group, given in answers.items() if len(given) > 1]
    if differing:
        first = next(item.place for item in items if item.row.group == differing[0])
        yield f"{len(differing)} prompts have different answers, the first at {first}"


def warnings(items: list[Item], splits: dict[str, list[Item]], stage: DatasetStage, counts: Counts) -> Iterator[str]:
    for name in ("validation", "test"):
        if 0 < (held := len(splits[name])) < MIN_ROWS:
            yield f"the {name} split has {held} of {len(items)} rows: too few for reliable figures; add rows, or raise split.{name}"
    groups = Counter(item.row.group for item in items)
    largest = max(groups.values(), default=0)
    if len(items) > 1 and 2 * largest > len(items):
        yield f"{largest} of {len(items)} rows have the same prompt or file, and so are all in one split"
    different = {item.row.reference() for item in items}
    if len(items) > 1 and len(different) == 1 and not different <= {None, ""}:  # empty for answers that only call tools
        yield f"all {len(items)} rows have the same answer: {str(different.pop())[:80]!r}"
    for fate in DROPPED:
        if fate != "not_drawn" and 2 * counts.total(fate) > counts.read.total():
            yield f"more than half of the rows were dropped ({fate}): {counts.total(fate)} of {counts.read.total()}"
    with_prompt = {f"sources.{i}" for i, source in enumerate(stage.sources) if system_of(source, stage) is not None}
    if others := sum(item.row.messages is None and item.row.source in with_prompt for item in items):
        yield f"the system prompt is only for conversations: {others} rows of other formats do not get it"
    if counts.ignored:
        yield f"columns and parts of messages are not read: {ignored(counts)}"
