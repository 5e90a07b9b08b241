"""Sequences shared by several processes: the adapter of one process, each row once, and refusals where attention is of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from pico import save_pico
from process_tools import finish, losses, start
from processes import PATIENCE
from sft_tools import furthest, request_for
from strategy_tools import FIELDS, TOLERANCE
from transformers import AutoModelForCausalLM

from tasks.launch import FAILURE_SUFFIX, RANKS
from tasks.training import sequences
from tuneline.errors import StageFailed
from tuneline.kinds.stage import Resources
from tuneline.workspace.protocol import Failure, Input, Request

COUNTS = ("num_tokens", "trained_tokens")  # of a step, by all processes together


@pytest.mark.slow
@pytest.mark.parametrize(
    "resources",
    [
        {"processes": 2, "strategy": "ddp", "micro_batch_size": 4},
        {"processes": 4, "strategy": "zero3", "micro_batch_size": 1, "gradient_checkpointing": True},
    ],
)
def test_shared_sequences_train_the_adapter_of_one_process(
    tmp_path: Path,
    base: Input,
    one: Request,
    resources: dict[str, Any],
) -> None:
    request = request_for(tmp_path, base, **FIELDS | {"resources": resources | {"sequence_parallel_size": 2}})
    finish(request, resources["processes"])
    assert "2 processes share each sequence: log-probabilities differ by" in (request.work / "log.txt").read_text()
    for of in ("loss", "eval_loss"):
        assert losses(request, of) == pytest.approx(losses(one, of), rel=TOLERANCE)
    first = json.loads((request.meta / "history.jsonl").read_text().split("\n")[0])
    assert first.items() >= {of: json.loads((one.meta / "history.jsonl").read_text().split("\n")[0])[of] for of in COUNTS}.items()
    assert furthest(one, request) < 1e-3


@pytest.mark.slow
def test_attention_that_exchanges_nothing_is_found_out(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would see its own tokens alone."""
    monkeypatch.setenv("PATCHES", "alone")
    request = request_for(tmp_path, base, resources={"processes": 2, "sequence_parallel_size": 2})
    assert start(request, 2).wait(timeout=PATIENCE) == 1
    found = "resources.sequence_parallel_size: found log-probabilities that differ"
    for rank in (0, 1):
        said = Failure.read(request.work / RANKS / f"{rank}{FAILURE_SUFFIX}")
        assert (said.failure_class, said.message[: len(found)]) == ("config", found)


@pytest.mark.parametrize(
    ("changes", "size", "found"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, 2, "found a model with sliding_attention, expected only full attention"),
        ({"sliding_window": 16}, 2, "found a model with sliding_attention"),
        ({"num_key_value_heads": None}, 2, "found a model of type llama without num_key_value_heads"),
        ({}, 8, r"found 8, expected 1, 2, 4, for 4 heads \(2 of keys\)"),
    ],
)
def test_a_model_that_cannot_share_is_refused(tmp_path: Path, changes: dict[str, Any], size: int, found: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_pico(tmp_path))
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(StageFailed, match=found) as caught:
        sequences.share(model, Resources(processes=size, sequence_parallel_size=size), 1)
    assert caught.value.failure_class == "config"


def test_the_parts_are_the_row_and_predict_the_next_token() -> None:
    batch = {"input_ids": torch.arange(16).view(2, 8), "labels": torch.arange(16).view(2, 8), "attention_mask": torch.ones(2, 8)}
    parts = [sequences.part(batch, number, 4) for number in range(4)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), batch["input_ids"])
    assert torch.cat([part["shift_labels"] for part in parts], 1)[0].tolist() == [1, 2, 3, 4, 5, 6, 7, -100]
    assert parts[3]["position_ids"].tolist() == [[6, 7], [6, 7]]
    assert "attention_mask" not in parts[0]


@settings(max_examples=50, deadline=None)
@given(some.integers(1, 60), some.integers(1, 4), some.integers(1, 4), some.integers(1, 3))
def test_each_group_is_dealt_its_rows_together(count: int, rows: int, size: int, groups: int) -> None:
    """accelerate deals out one micro-batch to each process in turn."""
    sampler = sequences.ForEachOfGroup(range(count), rows, Resources(processes=size * groups, sequence_parallel_size=size))  # type: ignore[arg-type]
    dealt = list(sampler)
    assert len(dealt) == len(sampler)
    batches = [tuple(dealt[start : start + rows]) for start in range(0, len(dealt), rows)]
    assert len(batches) % (size * groups) == 0  # nothing is left for accelerate to fill up
    of_groups = [set(batches[start : start + size]) for start in range(0, len(batches), size)]
    assert all(len(same) == 1 for same in of_groups)
    drawn = [row for same in of_groups for row in next(iter(same))]
    assert drawn[:count] == list(range(count))
    assert len(drawn) - count < rows * groups
