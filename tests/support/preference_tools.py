"""Pairs of answers and requests for tests of `dpo` and `kto`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from program_tools import make_request
from sft_tools import dataset

from tasks.data.rows import Row
from tuneline.workspace.protocol import Input, Request

SMALL: dict[str, Any] = {
    "kind": "dpo", "model": "base", "dataset": "data", "max_steps": 6, "global_batch_size": 4, "learning_rate": 1e-2,
    "lora": {"r": 4, "lora_alpha": 8},
}  # fmt: skip


def pair(i: int) -> Row:
    """A question whose better answer is polite, of either length."""
    question = {"role": "user", "content": f"{i} + {i}?" + " Quickly!" * (i % 3)}
    answers = [f"{2 * i}, please." + " Thank you." * (i % 4), f"{2 * i}, fool." + " Go away." * (i // 2 % 4)]
    chosen, rejected = ({"role": "assistant", "content": answer} for answer in answers)
    return Row(source="sources.0", messages=(question, chosen), rejected=rejected, id=f"row{i}", group=str(i))


PAIRS = [pair(i) for i in range(11)]
OTHER_PAIRS = [pair(i) for i in range(50, 57)]


def request_for(
    folder: Path, base: Input, rows: list[Row] = PAIRS, validation: list[Row] | None = None, adapter: Input | None = None, **fields: Any
) -> Request:
    inputs = {"model": base, "dataset": dataset(folder / "data", rows, validation)} | ({"adapter": adapter} if adapter else {})
    return make_request(folder, SMALL | fields | ({"adapter": "earlier"} if adapter else {}), inputs)


def labeled(i: int) -> Row:
    """The chosen answer of an even question, the rejected one of an odd one."""
    chosen, rejected = pair(i).alternatives()
    return replace(rejected if i % 2 else chosen, label=not i % 2)


LABELED = [labeled(i) for i in range(11)]


def curve(request: Request, name: str) -> list[float]:
    history = map(json.loads, (request.meta / "history.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry[name] for entry in history if name in entry]
