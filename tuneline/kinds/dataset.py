"""The stage kind `dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.fields import ArtifactType, ModelRef, OnUnrendered, Strict
from tuneline.kinds.sources import CodeSource, DataSource, FilesSource, HubSource
from tuneline.kinds.stage import ProgramStage

GRAMMARS = tuple(f"tree-sitter-{name}" for name in ("c", "cpp", "go", "java", "javascript", "python", "rust", "typescript"))
Share = Annotated[float, Field(ge=0, lt=1)]


class Split(Strict):
    validation: Share = 0.0
    """Share of the row groups held out for validation during training."""
    test: Share = 0.1
    """Share of the row groups held out for evaluation."""


class DatasetStage(ProgramStage):
    """Build a dataset from one or more sources: clean, deduplicate and split the rows by group, and write a report."""

    kind: Literal["dataset"]
    also_called: ClassVar = ("prepare", "preprocess", "tokenize", "rows", "files")
    program: ClassVar = "tasks.data.dataset"
    libraries: ClassVar = ("transformers", "tokenizers", "datasets", "pyarrow", "reasoning-gym", "tree-sitter", *GRAMMARS)
    figures: ClassVar = ("rows_train", "rows_validation", "rows_test")
    model: ModelRef | None = None
    """Model whose tokenizer counts tokens and whose chat template renders samples."""
    sources: tuple[DataSource, ...] = Field(min_length=1)
    """Sources of the rows, read in order."""
    system: str | None = None
    """System prompt added to conversations that have none."""
    dedup: Literal["content", "prompt", "none"] = "content"
    """Which rows count as duplicates; the first of them is kept. `content`: same text, and same `answer`, `tests`, `extra` and `tools`;
    `prompt`: same prompt, whatever the answer; `none`: keep all rows."""
    special_tokens: Literal["error", "escape", "keep"] = "error"
    """How to handle text that contains a special token of the model, such as `<|im_end|>`. `error`: treat the row as a bad row; `escape`:
    insert a space, so that the token becomes plain text; `keep`: keep it as the real token, for text that is already rendered."""
    split: Split = Split()
    """Shares of the rows held out for validation and test."""
    max_length: int | None = Field(None, ge=8)
    """Maximum length of a rendered row, in tokens."""
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """How to handle rows longer than max_length; the report counts them. Only plain text can be truncated."""
    on_unrendered: OnUnrendered = "error"
    """How to handle conversations of which the chat template omits a part, such as tool calls or a system prompt: `error` fails the
    stage, `drop` drops the row, `keep` keeps the row."""

    def output_type(self) -> ArtifactType:
        return "Dataset"

    def repositories(self) -> Iterator[tuple[str, str, str, str]]:
        for i, source in enumerate(self.sources):
            if isinstance(source, HubSource):
                yield f"sources.{i}.repo", "dataset", source.repo, source.revision

    def source_trees(self) -> dict[str, CodeSource]:
        return {f"sources.{i}.path": source for i, source in enumerate(self.sources) if isinstance(source, CodeSource)}

    def row_files(self) -> frozenset[str]:
        return frozenset(f"sources.{i}.path" for i, source in enumerate(self.sources) if isinstance(source, FilesSource))

    def packages(self) -> frozenset[str]:
        return frozenset()  # a tokenizer does not need torch

    def holds_out(self, split: str) -> bool:
        return bool(getattr(self.split, split))

    def problems(self) -> Iterator[Problem]:
        if self.on_unrendered != "error" and self.model is None:
            yield Problem(
                "on_unrendered",
                "found on_unrendered without model",
                "name the model whose chat template renders, for example `model: base`",
            )
        if self.max_length is not None and self.model is None:
            yield Problem(
                "max_length", "found max_length without model", "name the model whose tokenizer counts tokens, for example `model: base`"
            )
        if self.special_tokens != "error" and self.model is None:
            yield Problem(
                "special_tokens", "found special_tokens without model", "name the model whose tokens they are, for example `model: base`"
            )
        if self.over_long != "drop" and self.max_length is None:
            yield Problem("over_long", "found over_long without max_length", "remove it, or set max_length")
        for i, source in enumerate(self.sources):
            if isinstance(source, CodeSource) and self.model is None:
                hint = "name the model whose tokenizer measures chunks, for example `model: base`"
                yield Problem(f"sources.{i}", "found source code without model", hint)
            if isinstance(source, CodeSource) and self.max_length is not None and source.chunk_length > self.max_length:
                message = f"found {source.chunk_length}, expected at most max_length, {self.max_length}"
                yield Problem(f"sources.{i}.chunk_length", message, "lower it, or raise max_length: longer chunks would be over-long rows")
        yield from self._mixing_problems()
        if self.split.validation + self.split.test >= 1:
            yield Problem("split", f"found {self.split.validation} + {self.split.test}, expected a sum below 1")

    def _mixing_problems(self) -> Iterator[Problem]:
        weighed = [source.weight is not None for source in self.sources]
        if weighed == [True]:
            yield Problem("sources.0.weight", "found a weight of the only source: it has no effect", "remove it")
        elif any(weighed):
            for i, source in enumerate(self.sources):
                if source.weight is None:
                    found = "found no weight, expected one: other sources have weights"
                    yield Problem(f"sources.{i}", found, "add `weight: 1.0`, or remove the others")
                if source.repeat > 1:
                    found = "found repeat in a stage whose sources have weights, which already say how often rows are repeated"
                    yield Problem(f"sources.{i}.repeat", found, "remove it, or the weights")

    def repeats(self) -> bool:
        """Return whether rows may be in the train split several times."""
        return any(source.repeat > 1 or source.weight is not None for source in self.sources)
