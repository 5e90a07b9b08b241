"""Rows and requests for tests of `sft`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from program_tools import make_request
from safetensors.torch import load_file

from tasks.data.rows import SPLITS, Row, write_rows
from tuneline.workspace.protocol import Input, Request

SMALL: dict[str, Any] = {
    "kind": "sft", "model": "base", "dataset": "data", "max_steps": 6, "global_batch_size": 4, "learning_rate": 1e-2,
    "lora": {"r": 4, "lora_alpha": 8},
}  # fmt: skip


def chat(i: int, turns: int = 1) -> Row:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Add."}]
    for k in range(turns):
        messages += [{"role": "user", "content": f"{i} + {k}?"}, {"role": "assistant", "content": f"It is {i + k}, of course."}]
    return Row(source="s", messages=tuple(messages), id=f"row{i}", group=str(i))


ROWS = [chat(i, 1 + i % 3) for i in range(10)]


OTHERS = [chat(i, 1 + i % 3) for i in range(50, 55)]


# Trained on other answers than it is validated on, the loss must turn.
WRONG = [replace(row, messages=(*row.messages[:2], {"role": "assistant", "content": f"{row.id} + 2?"}), group=f"wrong{row.id}") for row in map(chat, range(3))]  # fmt: skip


TURNING: dict[str, Any] = {
    "early_stopping": {"patience": 2}, "eval_steps": 2, "max_steps": 60, "learning_rate": 3e-2, "validation": WRONG,
}  # fmt: skip


def dataset(folder: Path, train: list[Row], validation: list[Row] | None = None) -> Input:
    folder.mkdir(parents=True)
    for split, rows in zip(SPLITS, (train, validation or [], []), strict=True):
        write_rows(rows, folder / f"{split}.parquet")
    return Input(path=folder, digest="d" * 64, type="Dataset")


def request_for(folder: Path, base: Input, rows: list[Row] = ROWS, validation: list[Row] | None = None, **fields: Any) -> Request:
    inputs = {"model": base, "dataset": dataset(folder / "data", rows, validation)}
    if adapter := fields.pop("inputs", {}).get("adapter"):
        inputs["adapter"] = adapter
    return make_request(folder, {**SMALL, **fields}, inputs)


def weights(request: Request) -> dict[str, Any]:
    return load_file(request.payload / "adapter_model.safetensors")


def furthest(one: Request, other: Request) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
