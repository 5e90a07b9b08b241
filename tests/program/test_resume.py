"""Trainings of real processes, killed with -9 and begun again by the same request: they end where an undisturbed one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process_tools import finish, kill_at, losses, steps
from program_tools import payload_digest, run_program, run_until
from sft_tools import OTHERS, ROWS, TURNING, request_for

from tasks.training import checkpoints, sft
from tuneline.workspace.protocol import Events, Input, Request

DROPOUT = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


# Dropout and a validation on; the checkpoint lies in the middle of an epoch.
FIELDS: dict[str, Any] = {
    "lora": DROPOUT, "max_steps": 20, "learning_rate": 2e-3, "eval_steps": 7, "validation": OTHERS[:3], "resources": {"checkpoint_steps": 10},
}  # fmt: skip


@pytest.mark.slow
def test_killed_it_ends_bit_for_bit_as_undisturbed(tmp_path: Path, base: Input) -> None:
    """Before the first checkpoint, and after; with accumulation."""
    fields = FIELDS | {"resources": {"checkpoint_steps": 10, "micro_batch_size": 2}}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    for step in (1, 13):
        kill_at(killed, step)
        assert (killed.work / "checkpoints" / "checkpoint-10" / checkpoints.MARKER).exists() == (step > 10)
    before = len(steps(killed))
    assert finish(killed) == expected.metrics
    assert steps(killed)[before:] == list(range(11, 21))
    assert payload_digest(killed) == payload_digest(whole)
    assert (losses(killed), losses(killed, "eval_loss")) == (losses(whole), losses(whole, "eval_loss"))


@pytest.mark.slow
def test_stopped_while_it_packs_it_ends_bit_for_bit_as_undisturbed(tmp_path: Path, base: Input) -> None:
    fields = FIELDS | {"packing": True, "max_length": 128}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    run_until(killed, 13)
    before = len(steps(killed))
    assert run_program(killed)[0].metrics == expected.metrics
    assert steps(killed)[before:] == list(range(11, 21))
    assert payload_digest(killed) == payload_digest(whole)
    assert (losses(killed), losses(killed, "eval_loss")) == (losses(whole), losses(whole, "eval_loss"))


@pytest.mark.slow
def test_other_resources_after_a_kill_follow_the_same_curve(tmp_path: Path, base: Input) -> None:
    """From micro-batches of 8 to 4, as after an out-of-memory, and to 2 in each of two processes; rows that divide by none of it."""
    fields = {"rows": [*ROWS, OTHERS[4]], "global_batch_size": 8, "max_steps": 24, "eval_steps": 4, "validation": OTHERS[:3]}
    whole, killed = (request_for(tmp_path / name, base, **fields, resources={"checkpoint_steps": 5}) for name in ("whole", "killed"))
    run_program(whole)
    kill_at(killed, 12)
    for name, changed, processes in (("four", {"micro_batch_size": 4}, 1), ("two", {"micro_batch_size": 2, "processes": 2}, 2)):
        shutil.copytree(tmp_path / "killed", tmp_path / name)
        folders = {"out": tmp_path / name / "out", "work": tmp_path / name / "work"}
        request = killed.model_copy(update={**folders, "resources": {**killed.resources, **changed}})
        finish(request, processes)
        for of in ("loss", "eval_loss"):
            assert losses(request, of) == pytest.approx(losses(whole, of), rel=1e-3)


# --- checkpoints that must not be used --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, base: Input) -> Request:
    """Ended at step 5, with whole checkpoints of steps 2 and 4."""
    request = request_for(tmp_path_factory.mktemp("stopped") / "stopped", base, lora=DROPOUT, resources={"checkpoint_steps": 2})
    run_until(request, 5)
    assert names(request) == ["checkpoint-2", "checkpoint-4"]
    return request


def names(request: Request) -> list[str]:
    return sorted(path.name for path in (request.work / "checkpoints").iterdir())


def copied(request: Request, folder: Path) -> Request:
    shutil.copytree(request.work.parent, folder, dirs_exist_ok=True)
    return request.model_copy(update={"out": folder / "out", "work": folder / "work"})


def warnings(request: Request) -> list[str]:
    events = map(json.loads, (request.work / "events.jsonl").read_text().splitlines())
    return [event["message"] for event in events if event["type"] == "warning"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def other_key(marker: Path) -> None:
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "key": "f" * 64}))


def test_no_damaged_checkpoint_is_resumed_from(tmp_path: Path, stopped: Request) -> None:
    """Each file cut or missing, the marker too: the checkpoint before is taken, and a warning says why."""
    newest = stopped.work / "checkpoints" / "checkpoint-4"
    files = sorted(file.name for file in newest.iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(files)
    faults: list[tuple[str, Callable[[Path], None], str]] = [("complete", other_key, "belongs to another stage, ffffffffffff")]
    for name in files:
        size = (newest / name).stat().st_size
        marker = name == checkpoints.MARKER
        faults.append((name, cut, "is incomplete" if marker else f"is damaged ({name} has {size - 1} bytes instead of {size})"))
        faults.append((name, Path.unlink, "is incomplete" if marker else f"is damaged ({name} has no bytes instead of {size})"))
    for i, (name, damage, message) in enumerate(faults):
        request = copied(stopped, tmp_path / str(i))
        damage(request.work / "checkpoints" / "checkpoint-4" / name)
        arguments = sft.trainer_arguments(request, request.stage())  # type: ignore[arg-type]
        found = checkpoints.newest_checkpoint(arguments, request, request.stage().resources, Events(request.work / "events.jsonl"))
        assert found == request.work / "checkpoints" / "checkpoint-2"
        assert names(request) == ["checkpoint-2"]
        assert warnings(request) == [f"checkpoint-4 {message}: it is deleted"]


def test_from_the_checkpoint_before_it_ends_bit_for_bit_the_same(tmp_path: Path, base: Input, stopped: Request) -> None:
    whole = request_for(tmp_path / "whole", base, lora=DROPOUT)
    run_program(whole)
    request = copied(stopped, tmp_path / "killed")
    cut(request.work / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    _, events = run_program(request)
    assert [event["step"] for event in events if event["type"] == "progress"] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert payload_digest(request) == payload_digest(whole)


@pytest.mark.slow
def test_a_lost_best_adapter_is_not_replaced_by_the_last(tmp_path: Path, base: Input) -> None:
    """transformers would only warn, and hand over whatever came last."""
    whole, killed = (request_for(tmp_path / name, base, **TURNING) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    best = expected.metrics["best_step"]
    assert best < expected.metrics["steps"]
    run_until(killed, int(best) + 3)
    lost, newest = f"checkpoint-{best:.0f}", f"checkpoint-{best + 2:.0f}"
    assert names(killed) == sorted([lost, newest])
    (killed.work / "checkpoints" / lost / "adapter_model.safetensors").unlink()
    result, _ = run_program(killed)
    assert warnings(killed)[0].startswith(f"{lost} is damaged (adapter_model.safetensors has no bytes instead of")
    assert warnings(killed)[1:] == [f"{newest} needs the best adapter so far, in {lost}, which is missing: it is deleted"]
    assert result.metrics == expected.metrics
    assert payload_digest(killed) == payload_digest(whole)
