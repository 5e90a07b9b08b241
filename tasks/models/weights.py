"""Reads headers of safetensors files: names, types, shapes and places of a model's tensors, without reading a tensor.

A file is 8 bytes of header length (little endian), the header as JSON, then the data. The safetensors library checks the same
when it opens a file, but it maps whole files, and its errors name neither the file nor the cause.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tuneline.errors import StageFailed

WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors")  # not variants such as model.fp16.safetensors
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes: the format's own limit


@dataclass(frozen=True)
class Stored:
    """The place of a tensor: a file, and its bytes in it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Weights:
    parameters: int
    bytes: int
    files: int
    types: str
    """For example `F32, 272 tensors; I32, 3 tensors`."""


def read_weights(folder: Path) -> Weights:
    """Read every header. Raises StageFailed(data) if a file is truncated, or files and index disagree."""
    files = weight_files(folder)
    headers = {file.name: read_header(file) for file in files}
    check_index(folder, headers)
    tensors = [tensor for header in headers.values() for tensor in header.values()]
    types = Counter(tensor["dtype"] for tensor in tensors)
    return Weights(
        parameters=sum(prod(tensor["shape"]) for tensor in tensors),
        bytes=sum(file.stat().st_size for file in files),
        files=len(files),
        types="; ".join(f"{name}, {count} tensors" for name, count in sorted(types.items())),
    )


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Map each tensor's name to its dtype, shape and data_offsets."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise StageFailed("data", f"{file.name} is no safetensors file, or is truncated", "fetch it again")
        try:
            header: dict[str, dict[str, Any]] = json.loads(content.read(length))
        except ValueError as error:
            raise StageFailed("data", f"the header of {file.name} cannot be read: {error}", "fetch it again") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != 8 + length + end:
        raise StageFailed("data", f"{file.name}: found {size} bytes, expected {8 + length + end} by its header", "fetch it again")
    return header


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a model folder, in the order of its files."""
    single, index = folder / "model.safetensors", folder / INDEX
    files = ["model.safetensors"] if single.exists() else json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return {name: tensor for file in sorted(set(files)) for name, tensor in tensors_in(folder / file)}


def tensors_in(file: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of a file, in their order in it."""
    entries = sorted(read_header(file).items(), key=lambda item: tuple(item[1]["data_offsets"]))
    first = file.stat().st_size - max((entry["data_offsets"][1] for _, entry in entries), default=0)
    for name, entry in entries:
        start, end = entry["data_offsets"]
        yield name, Stored(file, entry["dtype"], tuple(entry["shape"]), first + start, end - start)


def check_index(folder: Path, headers: dict[str, dict[str, Any]]) -> None:
    """Raises StageFailed(data) unless every tensor is in the file that the index names. A model of one file has no index."""
    index = folder / INDEX
    if not index.is_file():
        if list(headers) != ["model.safetensors"]:
            raise StageFailed("data", f"found {', '.join(headers)} without {INDEX}", "fetch the model again: its index is missing")
        return
    expected: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted(set(expected.values()) - set(headers))
    if missing:
        raise StageFailed("data", f"{INDEX} names {', '.join(missing)}, found no such file", "fetch the model again")
    found = {name: file for file, header in headers.items() if file in expected.values() for name in header}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        where = found.get(name, "no file")
        raise StageFailed(
            "data",
            f"{len(wrong)} tensors do not match {INDEX}: found {name} in {where}, expected in {expected.get(name, 'no file')}",
            "index and weight files are of different models: fetch them again",
        )
