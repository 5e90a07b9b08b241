"""A full disk under the libraries that write: whatever they make of it, it is class `disk`, and it is said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from program_tools import make_request, run_process
from safetensors.torch import save_file
from small_disk import small_disk

from tasks.__main__ import classify
from tuneline.workspace.protocol import Failure

ROWS = 20_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


TENSORS = {"weight": torch.zeros(1_000_000)}


def torch_zip(folder: Path) -> None:
    torch.save(TENSORS, folder / "weights.pt")


def torch_zip_to_a_file(folder: Path) -> None:
    with (folder / "weights.pt").open("wb") as file:
        torch.save(TENSORS, file)


def torch_old(folder: Path) -> None:
    torch.save(TENSORS, folder / "weights.pt", _use_new_zipfile_serialization=False)


def safetensors(folder: Path) -> None:
    save_file(TENSORS, folder / "weights.safetensors")


def numpy(folder: Path) -> None:
    import numpy

    numpy.save(folder / "weights.npy", TENSORS["weight"].numpy())


def parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"x": torch.rand(ROWS * 20).tolist()}), folder / "rows.parquet")


def transformers(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes)).save_pretrained(folder / "model")


def datasets_generated(folder: Path) -> None:
    import datasets

    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}" * 20}) + "\n" for i in range(ROWS)))
    datasets.load_dataset("json", data_files=str(rows), cache_dir=str(folder / "cache"))


def datasets_map(folder: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"row {i}" * 20 for i in range(ROWS)]})
    rows.map(lambda row: {"longer": row["text"] * 2}, cache_file_name=str(folder / "rows.arrow"))


def text(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(b"x" * 2_000_000)


WRITERS = [torch_zip, torch_zip_to_a_file, torch_old, safetensors, numpy, parquet, transformers, datasets_generated, datasets_map, text]


@pytest.mark.parametrize("write", WRITERS, ids=[write.__name__ for write in WRITERS])
def test_a_library_that_meets_a_full_disk_fails_with_class_disk(disk: Path, tmp_path: Path, write: Callable[[Path], None]) -> None:
    request = make_request(tmp_path / "stage", {"kind": "model", "path": "x"}, {})
    with pytest.raises(Exception) as caught:  # noqa: PT011  (each library has its own)
        write(disk)
    failure = classify(caught.value, request.model_copy(update={"out": disk}))
    assert failure.failure_class == "disk", caught.value
    assert failure.message.startswith(f"the disk of {disk} is full: the program had written ")
    assert failure.message.endswith(" of 1.0 MB are free")
    assert failure.hint.startswith("free space with `tuneline gc`")
    assert "Traceback" in failure.details


def test_what_is_not_the_disks_stays_a_bug(tmp_path: Path) -> None:
    request = make_request(tmp_path / "stage", {"kind": "model", "path": "x"}, {})
    for error in (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), FileNotFoundError(2, "no", "x")):
        assert classify(error, request).failure_class == "bug"


@pytest.mark.slow
def test_a_program_on_a_full_disk_finds_room_to_say_so(disk: Path, tmp_path: Path) -> None:
    """Also where what it says goes to the same disk."""
    rows = tmp_path / "rows.jsonl"
    noise = random.Random(0)  # parquet would press words together
    rows.write_text("".join(json.dumps({"prompt": f"Question {i}?", "completion": noise.randbytes(100).hex()}) + "\n" for i in range(ROWS)))
    config = {"kind": "dataset", "sources": [{"type": "files", "path": str(rows)}]}
    request = make_request(disk / "stage", config, {}, files={"sources.0.path": [rows]})
    done = run_process(request)
    assert done.returncode == 1
    failure = Failure.read(request.work / "failure.json")
    assert (failure.failure_class, failure.message[:12]) == ("disk", "the disk of "), failure
    assert str(request.out) in failure.message
    assert not request.out.exists()
