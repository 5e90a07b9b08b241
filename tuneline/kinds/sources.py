"""Types of data sources: the part of a dataset stage under `sources:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneline.kinds.fields import ExternalPath, Repository, Revision, Strict

# File extensions of programming languages, from GitHub's linguist; used for sources without `include`.
LANGUAGES = frozenset(
    "bash c cc cjs clj cljs cpp cs cu cuh cxx dart el erl ex exs f90 fs go groovy h hh hpp hrl hs hxx java jl js jsx kt kts lua m mjs ml"
    " mli mm nim nix php pl pm proto ps1 py pyi pyx r rb rs scala sh sol sql swift tcl tf ts tsx v vhd vue svelte zig zsh".split()
)

OnBadRow = Literal["error", "drop"]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text", "prompt"]


class Source(Strict):
    """Fields that every source has: how many of its rows are used."""

    type: str
    max_rows: int | None = Field(None, ge=1)
    """Maximum number of rows used, drawn by the stage's seed from those that are left after cleaning and deduplication."""
    repeat: int = Field(1, ge=1)
    """Number of times that each row is in the train split. Rows held out are there once."""
    weight: float | None = Field(None, gt=0)
    """Weight of the source in the train split: its rows are w / (sum of all weights) of it. Rows are left out or repeated as needed; the
    size of the split stays the same. All sources of a stage have a weight, or none."""


class FilesSource(Source):
    """Read rows from local files: .jsonl, .json or .csv (each also as .gz), or .parquet."""

    type: Literal["files"]
    path: ExternalPath
    """File or glob, relative to pipelines.yaml; matching files are read in sorted order."""
    format: Format = "auto"
    """Format of the rows; `auto` detects it from the columns."""
    columns: dict[str, str] = {}
    """Column mapping, from tuneline's name to the file's, such as `{prompt: question, completion: solution}`."""
    system: str | None = None
    """System prompt added to conversations that have none, in place of the stage's; `""` adds none."""
    on_bad_row: OnBadRow = "error"
    """How to handle a row that cannot be read; the report counts and shows dropped rows."""


class HubSource(Source):
    """Read rows from a dataset on the hub."""

    type: Literal["hub"]
    repo: Repository
    """Dataset repository, `owner/name`."""
    revision: Revision = "main"
    """Branch, tag or commit of the repository; the commit it resolves to is in the cache key."""
    subset: str | None = None
    """Configuration (subset) of the dataset."""
    split: str = "train"
    """Split of the repository to read; tuneline makes its own splits from it."""
    format: Format = "auto"
    """Format of the rows; `auto` detects it from the columns."""
    columns: dict[str, str] = {}
    """Column mapping, from tuneline's name to the dataset's."""
    system: str | None = None
    """System prompt added to conversations that have none, in place of the stage's; `""` adds none."""
    on_bad_row: OnBadRow = "error"
    """How to handle a row that cannot be read; the report counts and shows dropped rows."""


class ReasoningGymSource(Source):
    """Generate rows with a verifiable answer, with the library reasoning-gym."""

    type: Literal["reasoning_gym"]
    task: str
    """Name of the reasoning-gym dataset, such as `chain_sum`."""
    size: int = Field(500, ge=1)
    """Number of rows to generate, before deduplication."""
    config: dict[str, bool | int | float | str | tuple[int, ...]] = {}
    """Settings of the reasoning-gym dataset, under reasoning-gym's names."""
    system: str | None = None
    """System prompt added to conversations that have none, in place of the stage's; `""` adds none."""


class CodeSource(Source):
    """Read chunks of source code from a source tree, as plain text for training code completion or fill-in-the-middle."""

    type: Literal["code"]
    path: ExternalPath
    """Folder of the source tree. Files ignored by its .gitignore files are skipped, and so are vendored and generated files."""
    include: tuple[str, ...] = ()
    """Globs of files to read, in .gitignore syntax: `["*.py", "/docs/**/*.md"]`. By default all programming languages are read."""
    exclude: tuple[str, ...] = ()
    """Globs of files and folders to skip, in .gitignore syntax."""
    licenses: tuple[str, ...] = ()
    """Allowed licenses as SPDX identifiers, such as `[Apache-2.0, MIT]`; other files are skipped and counted. A file's license is that of
    its SPDX line, else of the nearest LICENSE or COPYING file up to the top of its repository. By default all licenses are allowed."""
    chunk_length: int = Field(512, ge=32)
    """Maximum length of a chunk, in tokens. Chunks end at function boundaries where the language is supported, else at line ends."""
    fim_rate: float = Field(0.0, ge=0, le=1)
    """Share of chunks rendered as fill-in-the-middle (arXiv:2207.14255); the tokenizer must have FIM tokens."""


SOURCES: dict[str, type[Strict]] = {"files": FilesSource, "hub": HubSource, "reasoning_gym": ReasoningGymSource, "code": CodeSource}
DataSource = Annotated[FilesSource | HubSource | ReasoningGymSource | CodeSource, Field(discriminator="type")]
