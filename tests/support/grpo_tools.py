"""What the tests of grpo share: a pico model that is in two minds about an answer, and rows that ask for one of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pico import save_pico, teach
from program_tools import make_request

from tasks.data.rows import SPLITS, Row, write_rows
from tuneline.workspace.protocol import Input, Request

SMALL: dict[str, Any] = {
    "kind": "grpo", "model": "base", "dataset": "data", "rewards": [{"type": "exact_match"}], "max_steps": 4, "global_batch_size": 8,
    "num_generations": 4, "max_completion_length": 8, "learning_rate": 3e-3, "lora": {"r": 4, "lora_alpha": 8},
}  # fmt: skip


def question(i: int, answer: str = "It is 1.") -> Row:
    messages = ({"role": "system", "content": "Add."}, {"role": "user", "content": f"{i} + {i}?"})
    return Row(source="s", messages=messages, answer=answer, id=f"row{i}", group=str(i))


ROWS = [question(i) for i in range(8)]


def undecided(folder: Path, width: int = 64) -> Input:
    """A model that answers "It is 1." and "It is 2." about as often."""
    save_pico(folder, width=width)
    asked = [[*question(i).messages, {"role": "assistant", "content": f"It is {answer}."}] for i in range(8) for answer in (1, 2)]  # type: ignore[misc]
    return Input(path=teach(folder, asked), digest="b" * 64, type="Model")


def request_for(
    folder: Path, base: Input, adapter: Input | None = None, rows: list[Row] = ROWS, engine: Path | None = None, **fields: Any
) -> Request:
    data = folder / "data"
    data.mkdir(parents=True)
    for split in SPLITS:
        write_rows(rows if split == "train" else [], data / f"{split}.parquet")
    inputs = {"model": base, "dataset": Input(path=data, digest="d" * 64, type="Dataset")} | ({"adapter": adapter} if adapter else {})
    given = {"adapter": "sft"} if adapter else {}
    return make_request(folder, {**SMALL, **given, **fields}, inputs, engine=engine)
