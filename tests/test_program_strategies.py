"""Strategies of sharing a training, over two gloo ranks on pico models: the same result, and each survives what kills it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from program_tools import run_program
from safetensors.torch import load_file
from test_program_resume import finish, kill_at, losses, steps
from test_program_sft import OTHERS, ROWS, base, furthest, one_thread, request_for  # noqa: F401

from tuneline.protocol import Input

# Rows that divide by neither the batch nor the processes; a validation loss along the way.
FIELDS: dict[str, Any] = {
    "rows": [*ROWS, OTHERS[4]], "global_batch_size": 4, "max_steps": 12, "eval_steps": 4, "validation": OTHERS[:3],
}  # fmt: skip
TOLERANCE = 1e-4  # relative, of losses: sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_train_the_adapter_of_one(tmp_path: Path, base: Input, strategy: str) -> None:  # noqa: F811
    one = request_for(tmp_path / "one", base, **FIELDS)
    run_program(one)
    resources = {"processes": 2, "strategy": strategy, "checkpoint_steps": 4}
    two = request_for(tmp_path / "two", base, **FIELDS, resources=resources)
    finish(two, 2)
    assert f"{strategy} trains, 2 in all" in (two.work / "log.txt").read_text()
    for of in ("loss", "eval_loss"):
        assert losses(two, of) == pytest.approx(losses(one, of), rel=TOLERANCE)
    assert furthest(one, two) < 1e-3
