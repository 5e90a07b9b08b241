"""Checkpoints: which one a training resumes from, which resources can read it, and what plans report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_tools import planned

from tuneline.config.load import load
from tuneline.kinds.stage import Resources
from tuneline.planning.plan import PlanRow, plan, refusals
from tuneline.workspace.checkpoints import MARKER, Checkpoint, layout, newest
from tuneline.workspace.workspace import Workspace

KEY = "a" * 64
ZERO = {"strategy": "zero2", "processes": 2}


def write(work: Path, step: int, key: str = KEY, resources: dict[str, Any] | None = None, best: Path | None = None) -> Path:
    checkpoint = work / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = json.dumps({"best_model_checkpoint": str(best) if best else None})
    (checkpoint / "trainer_state.json").write_text(state)
    marker = {"key": key, "layout": layout(Resources.model_validate(resources or {})), "files": {"trainer_state.json": len(state)}}
    (checkpoint / MARKER).write_text(json.dumps(marker))
    return checkpoint


def test_the_newest_whole_one_counts(tmp_path: Path) -> None:
    assert newest(tmp_path, KEY) is None
    write(tmp_path, 9)
    best = write(tmp_path, 10, best=tmp_path / "checkpoints" / "checkpoint-10")
    needs_best = write(tmp_path, 20, best=best)
    (write(tmp_path, 100) / MARKER).unlink()
    write(tmp_path, 101, key="b" * 64)
    (write(tmp_path, 102) / "trainer_state.json").write_text("{")
    assert newest(tmp_path, KEY) == Checkpoint(needs_best, "replicated")
    (best / MARKER).unlink()
    found = newest(tmp_path, KEY)
    assert found is not None
    assert found.step == 9


@pytest.mark.parametrize(
    ("written", "wanted", "hint"),
    [
        ({}, {"processes": 4}, None),
        ({}, {"gpus": 2, "strategy": "device_map"}, None),
        ({"strategy": "fsdp", "gpus": 2}, {"strategy": "fsdp", "gpus": 8}, None),
        (ZERO, {"strategy": "zero1", "processes": 4}, None),
        ({"strategy": "zero3", "processes": 2}, {"strategy": "zero3"}, None),
        ({}, ZERO, "ddp"),
        (ZERO, {}, "zero1 or zero2"),
        (ZERO, {"strategy": "zero3", "processes": 2}, "zero1 or zero2"),
        ({"strategy": "zero3", "processes": 2}, ZERO, "zero3"),
        ({"strategy": "fsdp", "gpus": 2}, {"strategy": "zero3", "gpus": 2}, "fsdp"),
    ],
)
def test_what_reads_what(written: dict[str, Any], wanted: dict[str, Any], hint: str | None) -> None:
    of, now = (layout(Resources.model_validate(each)) for each in (written, wanted))
    refused = Checkpoint(Path("checkpoint-5"), of).refused(Resources.model_validate(wanted))
    assert refused == (
        hint
        and (
            f"checkpoint-5 was written with the strategy {of}, which {now} cannot read".replace("replicated", "ddp"),
            f"resume with {hint}, over any number of processes, or `--force` the stage to start from scratch",
        )
    )


@pytest.fixture
def unfinished(folder: Path) -> Path:
    """Build everything before the training, with a checkpoint of two processes at step 5."""
    from plan_tools import build

    build(folder)
    (key,) = [row.key for row in planned(folder, "sft.lora.r=8").values() if row.stage == "sft"]
    assert key is not None
    write(folder / ".tuneline" / "work" / key, 5, key, ZERO)
    return folder


def rows_of(folder: Path, *sets: str) -> tuple[Workspace, list[PlanRow]]:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", ("sft.lora.r=8", *sets)))
    return workspace, plan(workspace, "demo")


def test_a_plan_knows_what_a_training_goes_on_from(unfinished: Path) -> None:
    zero = ("sft.resources.strategy=zero1", "sft.resources.processes=4")
    workspace, rows = rows_of(unfinished, *zero)
    assert {row.stage: row.checkpoint.step for row in rows if row.checkpoint} == {"sft": 5}
    assert list(refusals(workspace.loaded, "demo", rows)) == []
    assert all(
        row.checkpoint is None for row in planned(unfinished, "sft.lora.r=8", force=("sft",)).values()
    )  # --force starts from scratch
    assert all(row.checkpoint is None for row in planned(unfinished).values())


def test_a_plan_foresees_that_a_checkpoint_will_be_refused(unfinished: Path) -> None:
    workspace, rows = rows_of(unfinished)
    (of_training,) = [row for row in rows if row.refused]
    assert (of_training.stage, of_training.checkpoint and of_training.checkpoint.step) == ("sft", 5)
    assert [str(problem) for problem in refusals(workspace.loaded, "demo", rows)] == [
        f"{unfinished}/pipelines.yaml:7:7: demo.sft.resources: checkpoint-5 was written with the strategy zero2 over 2 processes, which "
        "ddp cannot read\n\nhint: resume with zero1 or zero2, over any number of processes, or `--force` the stage to start from scratch"
    ]
