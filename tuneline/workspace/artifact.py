"""An artifact: its folder, its manifest, and the digest of its payload."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from tuneline.workspace.file_names import PAYLOAD

SCHEMA = 1


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    size: int
    sha256: str


class Base(BaseModel):
    """The Model that an Adapter was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    key: str
    digest: str
    template: str | None


class Manifest(BaseModel):
    """Describes an artifact: its key, its inputs, its files and its metrics. The digest depends only on `files`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_number: int = Field(SCHEMA, alias="schema")
    kind: str
    type: Literal["Model", "Adapter", "Dataset", "Report"]
    key: str
    document: dict[str, Any]
    """The document that the key is the hash of."""
    digest: str
    files: tuple[File, ...]
    parents: dict[str, str]
    """Upstream artifacts as `kind/key`, by input slot."""
    base: Base | None = None
    template: str | None = None
    """sha256 of the chat template saved with the artifact."""
    metrics: dict[str, FiniteFloat]
    info: dict[str, Any]
    host: dict[str, Any]
    """Facts about the machine, and times; in no key and no digest."""

    @property
    def size(self) -> int:
        """Size of the payload in bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: Manifest

    @property
    def payload(self) -> Path:
        return self.path / PAYLOAD

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def digest(self) -> str:
        return self.manifest.digest


def digest(files: tuple[File, ...]) -> str:
    """Return the sha256 over the sorted (path, sha256) of a payload's files."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def sizes(payload: Path) -> list[tuple[str, int]]:
    """Return (relative path, size in bytes) of every file, sorted. Links, which programs never create, have size -1."""
    found = []
    for folder, folders, names in os.walk(payload):
        for name in names + [name for name in folders if Path(folder, name).is_symlink()]:
            path = Path(folder, name)
            found.append((path.relative_to(payload).as_posix(), -1 if path.is_symlink() else path.stat().st_size))
    return sorted(found)
