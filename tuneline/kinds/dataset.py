"""The stage kind `dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.fields import ArtifactType, ModelRef, OnUnrendered, Strict
from tuneline.kinds.sources import CodeSource, DataSource
from tuneline.kinds.stage import ProgramStage

GRAMMARS = tuple(f"tree-sitter-{name}" for name in ("c", "cpp", "go", "java", "javascript", "python", "rust", "typescript"))
Share = Annotated[float, Field(ge=0, lt=1)]


class Split(Strict):
    validation: Share = 0.0
    """Share of the groups held out to watch a training."""
    test: Share = 0.1
    """Share of the groups held out for evaluation."""


class DatasetStage(ProgramStage):
    """Rows from one or more sources: cleaned, deduplicated, split by group and reported on."""

    kind: Literal["dataset"]
    program: ClassVar = "tasks.data.dataset"
    libraries: ClassVar = ("transformers", "tokenizers", "datasets", "pyarrow", "reasoning-gym", "tree-sitter", *GRAMMARS)
    figures: ClassVar = ("rows_train", "rows_validation", "rows_test")
    model: ModelRef | None = None
    """Model whose tokenizer and template count tokens and render samples."""
    sources: tuple[DataSource, ...] = Field(min_length=1)
    """Where rows come from, in order."""
    system: str | None = None
    """System prompt put before conversations that have none."""
    dedup: Literal["content", "prompt", "none"] = "content"
    """Which rows are duplicates, of which the first is kept: those that say and ask the same, `answer`, `tests`, `extra` and `tools` with
    it; those of one prompt, whatever the answer; or no rows."""
    special_tokens: Literal["error", "escape", "keep"] = "error"
    """What happens to a row whose text holds a special token of the model, as `<|im_end|>`: it counts as a bad row; a space is written
    into the token, so that it is text; or it stays, and is the real token, as in text that is rendered already."""
    split: Split = Split()
    """Shares held out."""
    max_length: int | None = Field(None, ge=8)
    """Tokens a rendered row may have."""
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row over max_length; only plain text can be truncated. Counted in the report."""
    on_unrendered: OnUnrendered = "error"
    """What happens to a conversation of which the model's chat template leaves something out, as calls or a system prompt."""

    def output_type(self) -> ArtifactType:
        return "Dataset"

    def packages(self) -> frozenset[str]:
        return frozenset()  # a tokenizer does not need torch

    def holds_out(self, split: str) -> bool:
        return bool(getattr(self.split, split))

    def problems(self) -> Iterator[Problem]:
        if self.on_unrendered != "error" and self.model is None:
            yield Problem("on_unrendered", "found on_unrendered without model", "name the model whose template renders: `model: base`")
        if self.max_length is not None and self.model is None:
            yield Problem("max_length", "found max_length without model", "name the model whose tokenizer counts: `model: base`")
        if self.special_tokens != "error" and self.model is None:
            yield Problem("special_tokens", "found special_tokens without model", "name the model whose tokens they are: `model: base`")
        if self.over_long != "drop" and self.max_length is None:
            yield Problem("over_long", "found over_long without max_length", "remove it, or set max_length")
        for i, source in enumerate(self.sources):
            if isinstance(source, CodeSource) and self.model is None:
                hint = "name the model whose tokenizer cuts the chunks: `model: base`"
                yield Problem(f"sources.{i}", "found source code without model", hint)
            if isinstance(source, CodeSource) and self.max_length is not None and source.chunk_length > self.max_length:
                message = f"found {source.chunk_length}, expected at most max_length, {self.max_length}"
                yield Problem(f"sources.{i}.chunk_length", message, "a longer chunk would be dropped or cut as every row is")
        if self.split.validation + self.split.test >= 1:
            yield Problem("split", f"found {self.split.validation} + {self.split.test}, expected a sum below 1")
