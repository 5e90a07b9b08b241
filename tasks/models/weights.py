"""Headers of safetensors files: names, types and shapes of a model's tensors without reading one.

A file is 8 bytes of header length (little endian), the header as JSON, then the data. The safetensors library checks the
same when it opens a file; it is not used here because it maps whole files and names neither file nor cause.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tuneline.errors import StageFailed

WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors")  # not variants as model.fp16.safetensors
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the format's own bound


@dataclass(frozen=True)
class Weights:
    parameters: int
    bytes: int
    files: int
    types: str
    """As `F32, 272 tensors; I32, 3 tensors`."""


def read_weights(folder: Path) -> Weights:
    """Reads every header; raises StageFailed(data) where a file is cut, or files and index disagree."""
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
    """Tensor name -> dtype, shape, data_offsets."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise StageFailed("data", f"{file.name} is no safetensors file, or is cut", "fetch it again")
        try:
            header: dict[str, dict[str, Any]] = json.loads(content.read(length))
        except ValueError as error:
            raise StageFailed("data", f"the header of {file.name} is not readable: {error}", "fetch it again") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != 8 + length + end:
        raise StageFailed("data", f"{file.name} has {size} bytes, its header tells of {8 + length + end}", "fetch it again")
    return header


def check_index(folder: Path, headers: dict[str, dict[str, Any]]) -> None:
    """Every tensor is where the index says, and nowhere else. A model of one file has no index."""
    index = folder / INDEX
    if not index.is_file():
        if list(headers) != ["model.safetensors"]:
            raise StageFailed("data", f"found {', '.join(headers)} without {INDEX}", "fetch the model again: its index is missing")
        return
    told: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted(set(told.values()) - set(headers))
    if missing:
        raise StageFailed("data", f"{INDEX} names {', '.join(missing)}, which is not there", "fetch the model again")
    found = {name: file for file, header in headers.items() if file in told.values() for name in header}
    wrong = sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        where = f"in {found[name]}" if name in found else "in no file"
        raise StageFailed(
            "data",
            f"{len(wrong)} tensors are not where {INDEX} says: {name} is {where}, told {told.get(name, 'nowhere')}",
            "index and weight files are of different models: fetch them again",
        )
