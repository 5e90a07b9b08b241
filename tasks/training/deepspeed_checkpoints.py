"""Loads DeepSpeed's checkpoints into trainings of another layout: over other processes, with ZeRO-1 in place of ZeRO-2.

Each process wrote its part of the optimizer's states; DeepSpeed's own converter puts them together by parameter (arXiv:2406.18820),
and each process of now takes its part of that. What is converted is needed only while it is read: it lies in a folder of its own, made
anew each time, so that what a kill leaves there counts for nothing. Left out: from ZeRO-3 to the others and back
(`tuneline.workspace.checkpoints`).
"""

from __future__ import annotations

import shutil
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import partial
from os import devnull
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from tuneline.kinds.stage import Resources
from tuneline.patches import patch
from tuneline.workspace import checkpoints

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FOLDER = "universal"  # in the work folder


def patch_loader(work: Path, resources: Resources) -> None:
    """Has transformers load any layout: what it resumes from, and early stopping's best."""
    from transformers import trainer

    patch(trainer, "deepspeed_load_checkpoint", partial(load, work / FOLDER, checkpoints.layout(resources)))


def load(folder: Path, wanted: str, engine: DeepSpeedEngine, checkpoint: str, load_module_strict: bool) -> None:
    """In place of transformers' own, called by every process; `folder` is for what is converted."""
    written = checkpoints.read(Path(checkpoint))
    converted = folder if written.layout != wanted else None
    if converted and engine.global_rank == 0:
        print(f"{written.path.name} is of {written.layout}: it is put together for {wanted}", flush=True)
        convert(written.path, converted)
    torch.distributed.barrier()
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    patch(engine._config, "load_universal_checkpoint", converted is not None)
    engine.load_checkpoint(str(converted or checkpoint), load_module_strict=load_module_strict)
    torch.distributed.barrier()
    if converted:
        fix_zero3_state(engine, decays)
        if engine.global_rank == 0:
            shutil.rmtree(converted)


def fix_zero3_state(engine: DeepSpeedEngine, decays: list[float]) -> None:
    """ZeRO-3 of DeepSpeed 0.19 gives all parameters one counter of steps, which each of their groups then moves on, and the weight decay
    of the first group (runtime/zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3)."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = deepcopy(state["step"])
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def convert(checkpoint: Path, folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(folder, ignore_errors=True)
    (parts,) = checkpoint.glob("global_step*")
    options: dict[str, Any] = {
        "input_folder": str(parts),
        "output_folder": str(folder / parts.name),
        "num_extract_workers": 1,  # more are forked, which a process with threads of gloo or CUDA must not be
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,  # which parameters are split by tensor parallelism: none
    }
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(SimpleNamespace(**options))
