"""Reads a `code` source: cuts each file of a source tree into chunks that a model can learn from.

    file -> lines, each with the depth of the syntax node that begins there -> chunks of whole nodes -> optional fill-in-the-middle

A chunk is cut where the outermost node begins: between definitions first, then between statements, and inside a statement only if
nothing else fits. Lines directly above a node (comments, attributes) stay with it. Files without an installed grammar are cut at
empty lines, then at any line. `tuneline.trees.select` chooses the files.

Left out on purpose: overlapping chunks (they would put held-out lines into training), the suffix-prefix-middle order, and
chunks that contain special tokens of the model as text, because a tokenizer would read them as the real tokens.
"""

from __future__ import annotations

import importlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data import special_tokens
from tasks.data.rows import Row, content_hash
from tuneline.errors import StageFailed
from tuneline.kinds.sources import CodeSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from tree_sitter import Node

# File ending -> (package of the grammar, its function).
GRAMMARS = {
    **dict.fromkeys(("py", "pyi"), ("tree_sitter_python", "language")),
    **dict.fromkeys(("js", "jsx", "mjs", "cjs"), ("tree_sitter_javascript", "language")),
    "ts": ("tree_sitter_typescript", "language_typescript"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "go": ("tree_sitter_go", "language"),
    "rs": ("tree_sitter_rust", "language"),
    "java": ("tree_sitter_java", "language"),
    "c": ("tree_sitter_c", "language"),
    **dict.fromkeys(("h", "cc", "cpp", "cxx", "hh", "hpp", "hxx", "cu", "cuh"), ("tree_sitter_cpp", "language")),
}
ATTACHED = re.compile(r"comment|attribute|decorator|annotation")  # nodes that belong to the one below them
EMPTY_LINE, ANY_LINE = 1_000_000, 2_000_000  # depths of cuts where no syntax node begins
# Prefix, suffix and middle token of each model family that has them. All families use them in the same order.
FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
FRAME = 8  # tokens that a chunk may grow by when its middle is moved: three frame tokens, and words cut in two places


@dataclass(frozen=True)
class Selected:
    """A `code` source and the files that were selected from its tree."""

    name: str
    """Field of the stage: `sources.0`."""
    source: CodeSource
    folder: Path
    files: list[Path]


def code_rows(tree: Selected, tokenizer: PreTrainedTokenizerBase, seed: int, left_out: Counter[str]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of each chunk, file by file; a file is a group. Counts unused chunks in `left_out`, by reason."""
    name, source = tree.name, tree.source
    frame = fill_in_the_middle_tokens(name, tokenizer) if source.fim_rate else None
    special = special_tokens.pattern(tokenizer)
    for file in tree.files:
        relative = file.relative_to(tree.folder).as_posix()
        lines = [f"{line}\n" for line in file.read_text(encoding="utf-8-sig").split("\n")]  # splitlines would cut at more characters
        for start, end in chunks(lines, depths(file, lines), tokenizer, source.chunk_length - (FRAME if frame else 0)):
            text = "".join(lines[start:end]).strip("\n")
            if not text.strip():
                continue
            if special and special.search(text):
                left_out["chunk with a special token"] += 1
            elif length(text, tokenizer) > source.chunk_length:
                left_out["line over chunk_length"] += 1
            else:
                moved = moved_middle(text, frame, source, seed, tokenizer) if frame else text
                extra = {"file": relative, "lines": [start + 1, end]} | ({"special_tokens": "keep"} if moved != text else {})
                yield f"{file}:{start + 1}", Row(name, text=moved, group=content_hash(relative), extra=extra)


def length(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a row with this text, including the eos token."""
    return len(tokenizer(text)["input_ids"]) + 1


# --- where a file may be cut ------------------------------------------------------------------------------------------


def depths(file: Path, lines: list[str]) -> list[int]:
    """Return for each line the depth of the outermost syntax node that begins there: lower is a better place to cut."""
    found = [EMPTY_LINE if i and not lines[i - 1].strip() and lines[i].strip() else ANY_LINE for i in range(len(lines))]
    grammar = GRAMMARS.get(file.suffix.lower().removeprefix("."))
    if grammar is None:
        return found
    from tree_sitter import Language, Parser

    language = Language(getattr(importlib.import_module(grammar[0]), grammar[1])())
    waiting = [(Parser(language).parse("".join(lines).encode()).root_node, 0)]
    while waiting:
        node, depth = waiting.pop()
        before: Node | None = None
        for child in node.children:
            row = child.start_point.row
            if row < len(lines) and not attached(before, child) and begins_line(lines[row], child):
                found[row] = min(found[row], depth)
            if child.end_point.row > row:
                waiting.append((child, depth + 1))
            before = child
    return found


def attached(before: Node | None, node: Node) -> bool:
    """Return whether a comment or similar node is directly above the node, or before it on its line."""
    if before is None or not ATTACHED.search(before.type):
        return False
    ends = before.end_point.row - (before.end_point.column == 0)  # some grammars include the line end in the comment
    return bool(node.start_point.row <= ends + 1)


def begins_line(line: str, node: Node) -> bool:
    return not line.encode()[: node.start_point.column].strip()


# --- chunks -----------------------------------------------------------------------------------------------------------


def chunks(lines: list[str], depths: list[int], tokenizer: PreTrainedTokenizerBase, limit: int) -> Iterator[tuple[int, int]]:
    """Yield (first line, line after the last) of chunks of at most `limit` tokens; a single line may be longer."""
    totals = [0, *accumulate(len(ids) for ids in tokenizer(lines, add_special_tokens=False)["input_ids"])]

    def within(start: int, end: int, room: int) -> Iterator[tuple[int, int]]:
        for first, last in cut(start, end, totals, depths, room):
            tokens = length("".join(lines[first:last]).strip("\n"), tokenizer)
            if tokens > limit and last - first > 1:  # rare: together the lines have more tokens than one by one
                yield from within(first, last, min(room - 1, room * limit // tokens))
            else:
                yield first, last

    yield from within(0, len(lines), limit - 1)


def cut(start: int, end: int, totals: list[int], depths: list[int], room: int) -> list[tuple[int, int]]:
    """Cut before the outermost nodes, join neighbors while they fit, and descend into those that do not fit.

    `totals` are the numbers of tokens before each line.
    """
    spans: list[tuple[int, int]] = []
    waiting = [(start, end)]
    while waiting:
        start, end = waiting.pop()
        if end - start == 1 or totals[end] - totals[start] <= room:
            spans.append((start, end))
            continue
        outermost = min(depths[start + 1 : end])
        borders = [start, *(line for line in range(start + 1, end) if depths[line] == outermost), end]
        joined = [(borders[0], borders[1])]
        for first, last in pairwise(borders[1:]):
            if totals[last] - totals[joined[-1][0]] <= room:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        waiting += reversed(joined)
    return spans


# --- fill in the middle -----------------------------------------------------------------------------------------------


def fill_in_the_middle_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    known: dict[str, Any] = tokenizer.get_vocab()
    for tokens in FILL_IN_THE_MIDDLE:
        if all(token in known for token in tokens):
            return tokens
    families = ", or ".join(" ".join(tokens) for tokens in FILL_IN_THE_MIDDLE)
    raise StageFailed(
        "config",
        f"{name}.fim_rate: the model's tokenizer has no tokens for fill-in-the-middle",
        f"set `fim_rate: 0`, or use a model that was trained with {families}",
    )


def moved_middle(text: str, frame: tuple[str, str, str], source: CodeSource, seed: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chunk with its middle moved to the end (arXiv:2207.14255), for a share `fim_rate` of chunks. Equal chunks are
    moved equally, so deduplication still finds them."""
    dice = random.Random(f"{seed}:{content_hash(text)}")
    if dice.random() >= source.fim_rate:
        return text
    left, right = sorted(dice.randrange(len(text) + 1) for _ in range(2))
    moved = f"{frame[0]}{text[:left]}{frame[1]}{text[right:]}{frame[2]}{text[left:right]}"
    return moved if length(moved, tokenizer) <= source.chunk_length else text
