"""Where the rows of a dataset come from, as types: the part of pipelines.yaml under `sources:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneline.kinds.fields import Path, Repository, Revision, Strict

# Endings of programming languages, as GitHub's linguist knows them; read where a source has no `include`.
LANGUAGES = frozenset(
    "bash c cc cjs clj cljs cpp cs cu cuh cxx dart el erl ex exs f90 fs go groovy h hh hpp hrl hs hxx java jl js jsx kt kts lua m mjs ml"
    " mli mm nim nix php pl pm proto ps1 py pyi pyx r rb rs scala sh sol sql swift tcl tf ts tsx v vhd vue svelte zig zsh".split()
)

OnBadRow = Literal["error", "drop"]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "prompt"]


class FilesSource(Strict):
    """Rows from local files: .jsonl, .json or .csv, each also as .gz, or .parquet."""

    type: Literal["files"]
    path: Path
    """File or glob, relative to pipelines.yaml; matches are read in sorted order."""
    format: Format = "auto"
    """How a row is read; `auto` goes by the columns found."""
    columns: dict[str, str] = {}
    """Renames columns before reading: our name to the file's, as `{prompt: question, completion: solution}`."""
    on_bad_row: OnBadRow = "error"
    """What happens to a row that cannot be read; dropped ones are counted and shown."""


class HubSource(Strict):
    """Rows of a dataset on the hub."""

    type: Literal["hub"]
    repo: Repository
    """Dataset repository, `owner/name`."""
    revision: Revision = "main"
    """Branch, tag or commit; the commit is in the key."""
    subset: str | None = None
    """Configuration name of the repository."""
    split: str = "train"
    """Split of the repository to read; tuneline makes its own splits from it."""
    format: Format = "auto"
    """How a row is read; `auto` goes by the columns found."""
    columns: dict[str, str] = {}
    """Renames columns before reading: our name to theirs."""
    on_bad_row: OnBadRow = "error"
    """What happens to a row that cannot be read; dropped ones are counted and shown."""


class ReasoningGymSource(Strict):
    """Generated rows with a verifiable answer, from the library reasoning-gym."""

    type: Literal["reasoning_gym"]
    task: str
    """Name of the reasoning-gym dataset, such as `chain_sum`."""
    size: int = Field(500, ge=1)
    """Rows generated, before duplicates are removed."""
    config: dict[str, bool | int | float | str | tuple[int, ...]] = {}
    """Settings of that dataset, as reasoning-gym names them."""


class CodeSource(Strict):
    """Functions and passages of a source tree, as plain text to learn completion or fill-in-the-middle from."""

    type: Literal["code"]
    path: Path
    """Folder of the tree. What its .gitignore files leave out is left out, and vendored and generated files too."""
    include: tuple[str, ...] = ()
    """Globs of files to read, as in a .gitignore: `["*.py", "/docs/**/*.md"]`. Empty reads every programming language."""
    exclude: tuple[str, ...] = ()
    """Globs of files and folders to leave out, as in a .gitignore."""
    licenses: tuple[str, ...] = ()
    """SPDX names of licenses allowed, as `[Apache-2.0, MIT]`; other files are left out and counted. A file's license is that of its SPDX
    line, else of the nearest LICENSE or COPYING file, up to the top of its repository. Empty allows all."""
    chunk_length: int = Field(512, ge=32)
    """Tokens a chunk has at most; it ends at the border of a function where the language is known, else of a line."""
    fim_rate: float = Field(0.0, ge=0, le=1)
    """Share of chunks written as fill-in-the-middle (arXiv:2207.14255); the tokenizer must have the tokens for it."""


SOURCES: dict[str, type[Strict]] = {"files": FilesSource, "hub": HubSource, "reasoning_gym": ReasoningGymSource, "code": CodeSource}
DataSource = Annotated[FilesSource | HubSource | ReasoningGymSource | CodeSource, Field(discriminator="type")]
