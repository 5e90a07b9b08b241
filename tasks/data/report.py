"""Writes the report that users read before training on a Dataset: counts, token lengths, and three rows as the model sees them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.masks import Tokens, sequences, tokenize
from tasks.data.rows import SPLITS, Row, read_rows
from tasks.data.sources import AnySource, Counts, Item
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.sources import CodeSource, FilesSource, HubSource
from tuneline.wording import markdown_table
from tuneline.workspace.file_names import REPORT_DATA, REPORT_TEXT
from tuneline.workspace.protocol import Events, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SAMPLE = 4000  # characters shown
BINS = 12
BAR = 40  # characters of the longest bar


def write_report(
    request: Request,
    stage: DatasetStage,
    splits: dict[str, list[Item]],
    counts: Counts,
    tokenizer: PreTrainedTokenizerBase | None,
    events: Events,
) -> dict[str, float]:
    """Write report.md, lengths.png and report.json (for the run's report), and emit the samples as events.

    Returns the token figures as metrics.
    """
    parts = ["# Dataset\n", source_table(stage, splits, counts)]
    if counts.ignored:
        parts.append(f"Not read: {ignored(counts)}.\n")
    if counts.left_out:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in counts.left_out.most_common())
        parts.append(f"Left out of the source trees (files, whole folders, chunks): {reasons}.\n")
    figures: dict[str, float] = preferences(item.row for items in splits.values() for item in items)
    if figures:
        listed = ", ".join(f"{value:,.0f} {name}" for name, value in figures.items())
        parts.append(f"Rows for preference training: {listed} (pairs of a chosen and a rejected answer; labels of single answers).\n")
    lengths: list[int] = []
    if tokenizer is not None:
        lengths = sorted(item.tokens for items in splits.values() for item in items)
        quantiles = {f"tokens_p{share}": quantile(lengths, share / 100) for share in (50, 90, 99)}
        counted = {"tokens_train": sum(item.tokens for item in splits["train"]), **quantiles, "tokens_max": lengths[-1]}
        figures |= counted
        listed = ", ".join(f"{name.removeprefix('tokens_')} {value:,}" for name, value in counted.items())
        bars = "\n".join(histogram(lengths))
        parts.append(f"## Tokens\n\nPer row; train: of the whole split. {listed}\n\n```\n{bars}\n```\n")
        plot(lengths, stage.max_length, request.meta / "lengths.png")
    trained = "Text between ⟦ and ⟧ is trained on (`train_on: assistant`)."
    parts.append(f"## Samples\n\n{trained if tokenizer else 'Without `model`, not rendered as a model sees them.'}\n")
    last = len(splits["train"]) - 1
    for row in read_rows(request.payload / "train.parquet", sorted({0, (last + 1) // 2, last})):  # read back, to show the stored rows
        text = rendered(row, tokenizer) if tokenizer is not None else plain(row)
        text = text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " ..."
        events.sample(text, {"id": row.id, "source": row.source})
        parts.append(f"Row {row.id} of {row.source}:\n\n{fenced(text)}\n")
    (request.meta / REPORT_TEXT).write_text("\n".join(parts), encoding="utf-8")
    document = {
        "sources": list(by_source(stage, splits, counts)),
        "lengths": bins(lengths) if lengths else [],
        "ignored": counts.ignored,
        "left_out": counts.left_out,
    }
    (request.meta / REPORT_DATA).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return figures


def preferences(rows: Iterable[Row]) -> dict[str, float]:
    """Count pairs and labels; empty if there are none."""
    names = {True: "desirable", False: "undesirable", None: "others"}
    kinds = Counter("pairs" if row.rejected is not None else names[row.label] for row in rows)
    return {name: kinds[name] for name in ("pairs", "desirable", "undesirable") if kinds[name]}


def ignored(counts: Counts) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.ignored.items()))


def by_source(stage: DatasetStage, splits: dict[str, list[Item]], counts: Counts) -> Iterator[dict[str, Any]]:
    """Yield each source's entry in report.json: rows read, rows of each fate, and rows in each split. Where rows are repeated, `shown` is
    the number of rows in train.parquet, and `train` that of different ones."""
    for index, source in enumerate(stage.sources):
        name = f"sources.{index}"
        own = {split: [item for item in splits[split] if item.row.source == name] for split in SPLITS}
        rows = {split: len(set(map(id, items))) for split, items in own.items()}
        if stage.repeats():
            rows["shown"] = len(own["train"])
        fates = {fate: count for (fate, of), count in sorted(counts.fates.items()) if of == name}
        yield {"source": title(source), "read": counts.read[name], "fates": fates, "splits": rows}


def source_table(stage: DatasetStage, splits: dict[str, list[Item]], counts: Counts) -> str:
    entries = list(by_source(stage, splits, counts))
    drawn = ["not_drawn"] if any("not_drawn" in entry["fates"] for entry in entries) else []
    fates = ["bad_rows", "over_long", *(["unrendered"] if counts.total("unrendered") else []), "duplicates", *drawn]
    names = list(entries[0]["splits"])
    lines = []
    for entry in entries:
        figures = [entry["read"], *(entry["fates"].get(fate, 0) for fate in fates), *(entry["splits"][name] for name in names)]
        lines.append([entry["source"], *(f"{figure:,}" for figure in (*figures, entry["fates"].get("truncated", 0)))])
    head = ("source", "read", *(fate.replace("_", " ") for fate in fates), *names, "truncated")
    return markdown_table(head, lines, right=True) + "\n"


def title(source: AnySource) -> str:
    return source.path if isinstance(source, FilesSource | CodeSource) else source.repo if isinstance(source, HubSource) else source.task


# --- token lengths ----------------------------------------------------------------------------------------------------


def quantile(ordered: list[int], share: float) -> int:
    """Return the smallest length that at least `share` of the rows do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def bins(ordered: list[int]) -> list[tuple[int, int, int]]:
    """Return (least, greatest, rows) of each of about BINS ranges of equal width."""
    width = ordered[-1] // BINS + 1
    counts = Counter(length // width for length in ordered)
    return [(i * width, i * width + width - 1, counts[i]) for i in range(ordered[0] // width, ordered[-1] // width + 1)]


def histogram(ordered: list[int]) -> list[str]:
    ranges = bins(ordered)
    scale = BAR / max(rows for _, _, rows in ranges)
    digits = len(str(ordered[-1]))
    return [f"{least:>{digits}} - {most:<{digits}} {'#' * round(rows * scale):<{BAR}} {rows:,}" for least, most, rows in ranges]


def plot(lengths: list[int], max_length: int | None, file: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which would need a display

    figure = Figure(figsize=(6, 3), layout="tight")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=50)
    axes.set(xlabel="tokens of a row", ylabel="rows")
    if max_length is not None:
        axes.axvline(max_length, color="black", linestyle="--")
    figure.savefig(file, dpi=100)


# --- samples ----------------------------------------------------------------------------------------------------------


def rendered(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render the row as the model sees it, trained text between ⟦ and ⟧; several sequences below one another, and of a pair the rejected
    answer below the chosen one."""
    if row.rejected is not None:
        return "\n\n--- rejected:\n".join(marked(tokenize(each, tokenizer, "completion"), tokenizer) for each in row.alternatives())
    return "\n\n".join(marked(tokens, tokenizer) for tokens in sequences(row, tokenizer))


def marked(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    text = ""
    for trained, run in groupby(zip(tokens.input_ids, tokens.trained, strict=True), key=lambda pair: pair[1]):
        part = str(tokenizer.decode([token for token, _ in run]))
        text += f"⟦{part}⟧" if trained else part
    return text


def plain(row: Row) -> str:
    if row.rejected is not None:
        return "\n\n--- rejected:\n".join(map(plain, row.alternatives()))
    if row.messages is not None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in row.messages)
    return row.text if row.text is not None else f"{row.prompt}{row.completion or ''}"


def fenced(text: str) -> str:
    """Return a code block, also for text that contains fences."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
