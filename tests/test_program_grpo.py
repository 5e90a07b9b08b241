"""The grpo program on pico models: what it learns, what it hands over, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import save_pico, teach
from program_tools import make_request, payload_digest, run_process, run_program
from safetensors.torch import load_file

from tasks import grpo
from tasks.rows import SPLITS, Row, write_rows
from tuneline.errors import StageFailed
from tuneline.protocol import Events, Input, Request

SMALL: dict[str, Any] = {
    "kind": "grpo", "model": "base", "dataset": "data", "rewards": [{"type": "exact_match"}], "max_steps": 4, "global_batch_size": 8, "num_generations": 4,
    "max_completion_length": 8, "learning_rate": 1e-2, "lora": {"r": 4, "lora_alpha": 8},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Input:
    """A model that answers "It is 1." and "It is 2." about as often."""
    folder = save_pico(tmp_path_factory.mktemp("pico") / "model", vocabulary=9_700)
    asked = [[*question(i).messages, {"role": "assistant", "content": f"It is {answer}."}] for i in range(8) for answer in (1, 2)]
    return Input(path=teach(folder, asked), digest="b" * 64, type="Model")


def question(i: int, answer: str = "It is 1.") -> Row:
    messages = ({"role": "system", "content": "Add."}, {"role": "user", "content": f"{i} + {i}?"})
    return Row(source="s", messages=messages, answer=answer, id=f"row{i}", group=str(i))


ROWS = [question(i) for i in range(8)]


def folder_of(folder: Path, rows: list[Row]) -> Input:
    folder.mkdir(parents=True)
    for split in SPLITS:
        write_rows(rows if split == "train" else [], folder / f"{split}.parquet")
    return Input(path=folder, digest="d" * 64, type="Dataset")


def request_for(folder: Path, base: Input, adapter: Input | None = None, rows: list[Row] = ROWS, **fields: Any) -> Request:
    inputs = {"model": base, "dataset": folder_of(folder / "data", rows)} | ({"adapter": adapter} if adapter else {})
    given = {"adapter": "sft"} if adapter else {}
    return make_request(folder, {**SMALL, **given, **fields}, inputs)


def test_it_learns_what_is_rewarded(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path, base, max_steps=20, global_batch_size=16, num_generations=8, learning_rate=3e-3)
    result, events = run_program(request)
    print(result.metrics)
    print([round(e["value"], 2) for e in events if e.get("name") == "reward"])
    assert result.metrics["reward_gain"] > 0.1
