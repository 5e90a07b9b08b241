"""Loads DeepSpeed's checkpoints into trainings of another layout: another number of processes, or ZeRO-1 instead of ZeRO-2.

Each process wrote its part of the optimizer's states. DeepSpeed's own converter joins them by parameter (arXiv:2406.18820), and each
current process takes its part. The converted checkpoint is needed only while it is read: it is in a separate folder, rebuilt each time,
so that leftovers of a killed process do not matter. Left out: conversion between ZeRO-3 and the others
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
    """Patch transformers to load any layout, both to resume and for early stopping's best checkpoint."""
    from transformers import trainer

    patch(trainer, "deepspeed_load_checkpoint", partial(load, work / FOLDER, checkpoints.layout(resources)))


def load(folder: Path, wanted: str, engine: DeepSpeedEngine, checkpoint: str, load_module_strict: bool) -> None:
    """Replace transformers' own function, called by every process; `folder` is for the converted checkpoint."""
    written = checkpoints.read(Path(checkpoint))
    converted = folder if written.layout != wanted else None
    if converted and engine.global_rank == 0:
        print(f"{written.path.name} has the layout {written.layout}: it is converted to {wanted}", flush=True)
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
    """Restore what DeepSpeed 0.19's ZeRO-3 loads wrongly: one step counter shared by all parameters, which each group advances, and the
    first group's weight decay for all (runtime/zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3)."""
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
        "num_extract_workers": 1,  # more would fork, which a process with threads of gloo or CUDA must not
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,  # names the parameters split by tensor parallelism: none
    }
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(SimpleNamespace(**options))
