"""Find the checkpoint that an unfinished training resumes from, and the resources that can read it.

Programs write checkpoints below WORK/checkpoints and resume from them (`tasks/training/checkpoints.py`). Plans and runs predict this.
A checkpoint is complete only with its marker, which is written last. Imports nothing that only some runtimes have.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.kinds.stage import Resources

FOLDER = "checkpoints"
MARKER = "complete"
REPLICATED = "replicated"
# Strategies that can read a checkpoint, by the first word of its layout. DeepSpeed reshards a checkpoint for any number of
# processes; shards of ZeRO-3 differ from those of ZeRO-1 and 2 (checkpoint/ds_to_universal.py).
FAMILIES = {REPLICATED: "ddp", "zero1": "zero1 or zero2", "zero2": "zero1 or zero2"}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    layout: str

    @property
    def step(self) -> int:
        return step_of(self.path)

    def refused(self, resources: Resources) -> tuple[str, str] | None:
        """Return (message, hint) if a training with these resources cannot read the checkpoint, else None."""
        wanted, family = layout(resources), _family(self.layout)
        if _family(wanted) == family:
            return None
        written, now = (name.replace(REPLICATED, "ddp") for name in (self.layout, wanted))
        found = f"{self.path.name} was written with the strategy {written}, which {now} cannot read"
        return found, f"resume with {family}, over any number of processes, or `--force` the stage to start from scratch"


def layout(resources: Resources) -> str:
    """Return the layout of checkpoints. FSDP's can be resharded for any number of processes, so it names no number."""
    if resources.uses_deepspeed:
        return f"{resources.strategy} over {processes(resources.world_size)}"
    return "fsdp" if resources.strategy == "fsdp" else REPLICATED


def _family(layout: str) -> str:
    strategy = layout.split()[0]
    return FAMILIES.get(strategy, strategy)


def processes(count: int) -> str:
    return f"{count} {'process' if count == 1 else 'processes'}"


def step_of(checkpoint: Path) -> int:
    return int(re.sub(r"\D", "", checkpoint.name))


def in_order(folder: Path) -> list[Path]:
    """Return the checkpoints below a folder, complete or not, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of)


def newest(work: Path, key: str) -> Checkpoint | None:
    """Return the checkpoint that a training in this work folder will resume from, if any."""
    for checkpoint in reversed(in_order(work / FOLDER)):
        if problem(checkpoint, key) is None:
            return read(checkpoint)
    return None


def read(checkpoint: Path) -> Checkpoint:
    marker: dict[str, Any] = json.loads((checkpoint / MARKER).read_bytes())
    return Checkpoint(checkpoint, marker.get("layout", REPLICATED))


def problem(checkpoint: Path, key: str) -> str | None:
    """Return why a training cannot resume from a checkpoint, or None."""
    try:
        marker = json.loads((checkpoint / MARKER).read_bytes())
    except (OSError, ValueError):
        return "is incomplete"
    if marker["key"] != key:
        return f"belongs to another stage, {marker['key'][:12]}"
    there = sizes(checkpoint)
    if damaged := sorted(name for name, size in marker["files"].items() if there.get(name) != size):
        return f"is damaged ({damaged[0]} has {there.get(damaged[0], 'no')} bytes instead of {marker['files'][damaged[0]]})"
    best = json.loads((checkpoint / "trainer_state.json").read_bytes())["best_model_checkpoint"]
    if best and best != str(checkpoint) and problem(Path(best), key):  # transformers would only warn and keep the last adapter
        return f"needs the best adapter so far, in {Path(best).name}, which is missing"
    return None


def sizes(checkpoint: Path) -> dict[str, int]:
    """Return the sizes of a checkpoint's files except the marker, by name."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
