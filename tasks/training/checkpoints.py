"""Writes a training's checkpoints, and decides which are complete and which may be resumed from.

Imports torch and transformers at the top because it subclasses them; programs import it inside `run`.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.training import deepspeed_checkpoints, methods
from tasks.training.shared import adapter_tensors
from tuneline.errors import StageFailed
from tuneline.files import sync
from tuneline.kinds.stage import Resources
from tuneline.workspace import checkpoints
from tuneline.workspace.checkpoints import MARKER, REPLICATED, in_order
from tuneline.workspace.protocol import Events, Request

ADAPTER = "adapter_model.safetensors"
WHOLE = "model.safetensors"


def checkpoint_steps(resources: Resources) -> int:
    """Return the steps between checkpoints: unlimited if minutes are configured, but the last step always writes one."""
    return resources.checkpoint_steps if resources.checkpoint_minutes is None else 2**31


class Checkpoints(TrainerCallback):
    """Writes a checkpoint when one is due, and another on a SIGTERM. Marks each as complete once all of it, from every process, has
    reached the disk, with the stage's key, its layout and its files' sizes."""

    def __init__(self, request: Request, resources: Resources, every: int = 1):
        """Writes checkpoints only at multiples of `every` steps."""
        self.key, self.resources, self.every = request.key, resources, every
        self._terminated = False
        self._since = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.monotonic()
        self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self._handler)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._terminated = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        minutes = self.resources.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self._since > 60 * minutes
        said = torch.tensor([self._terminated, due], dtype=torch.int32, device=args.device)
        if args.world_size > 1:  # processes see a signal and the clock at different steps
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        self._terminated, due = map(bool, said.tolist())
        if (self._terminated or due) and state.global_step % self.every == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        layout = checkpoints.layout(self.resources)
        file, tensors = ADAPTER, None
        if layout != REPLICATED and isinstance(model, PeftModel):  # the file of DeepSpeed or FSDP holds a part, or is rounded
            tensors = adapter_tensors(model)
        elif layout != REPLICATED:
            file, tensors = WHOLE, methods.weights(model, state.is_world_process_zero)
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            if tensors is not None:
                save_file(tensors, checkpoint / file, metadata={"format": "pt"})
            sizes = checkpoints.sizes(checkpoint)
            for name in sizes:
                sync(checkpoint / name)
            (checkpoint / MARKER).write_text(json.dumps({"key": self.key, "layout": layout, "files": sizes}, indent=1), encoding="utf-8")
            for path in (checkpoint / MARKER, checkpoint, checkpoint.parent):
                sync(path)
        self._since = time.monotonic()
        if self._terminated:
            args.distributed_state.wait_for_everyone()
            raise StageFailed(
                "transient", f"stopped by SIGTERM: a checkpoint of step {state.global_step} was written", "run again: it resumes there"
            )


def newest_checkpoint(arguments: TrainingArguments, request: Request, resources: Resources, events: Events) -> Path | None:
    """Return the checkpoint to resume from. Deletes, with a warning, those that are incomplete or useless here.

    Raises StageFailed(config) if the newest cannot be read with these resources: its work is never deleted without being asked.
    """
    folder = Path(arguments.output_dir)
    if arguments.process_index == 0:
        for checkpoint in in_order(folder):  # in_order puts the best adapter's before a later step's
            if problem := checkpoints.problem(checkpoint, request.key):
                events.warning(f"{checkpoint.name} {problem}: it is deleted")
                shutil.rmtree(checkpoint)
    arguments.distributed_state.wait_for_everyone()
    newest = next(reversed(in_order(folder)), None)
    if newest is not None and (refused := checkpoints.read(newest).refused(resources)):
        raise StageFailed("config", *refused)
    if resources.uses_deepspeed:
        deepspeed_checkpoints.patch_loader(request.work, resources)
    return newest


def train_to_end(trainer: Trainer, request: Request, resources: Resources, events: Events) -> tuple[TrainerState, Path | None]:
    """Train from the newest checkpoint, if there is one. Return the final state, and the checkpoint with its weights if a killed process
    had finished the training: the best one with early stopping, else the last."""
    checkpoint = newest_checkpoint(trainer.args, request, resources, events)
    state = ended_at(checkpoint) if checkpoint else None
    if checkpoint and state:
        return state, Path(state.best_model_checkpoint or checkpoint)
    if checkpoint:
        print(f"resuming from {checkpoint.name}", flush=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state, None


def ended_at(checkpoint: Path) -> TrainerState | None:
    """Return the trainer's state if the training had ended by this checkpoint, else None.

    transformers must not resume from such a checkpoint: it would always take another step.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"] else None


def load_adapter(model: PeftModel, checkpoint: Path) -> None:
    set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER))
