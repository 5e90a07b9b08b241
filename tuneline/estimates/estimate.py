"""Estimate trainings and merges for `tuneline plan`: parameters, memory per device, disk. Imports no torch, reads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tuneline.estimates.architectures import BYTES, Architecture, architecture_of
from tuneline.estimates.memory import PROCESS, Job, Memory
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.merge import MergeStage
from tuneline.kinds.stage import Stage
from tuneline.kinds.training import Training
from tuneline.planning.plan import PlanRow
from tuneline.workspace.checkpoints import Checkpoint, layout
from tuneline.workspace.workspace import Workspace

UNIVERSAL = 2 * 12  # bytes per trained parameter that DeepSpeed's converter writes: states per process, then per parameter


@dataclass(frozen=True)
class Estimate:
    unknown: str = ""
    """Reason why there is no estimate; all other fields are then None."""
    parameters: int | None = None
    """Parameters of the trained or written model, without an adapter."""
    trainable: int | None = None
    """Trained parameters; None for a merge."""
    sequence_length: int | None = None
    """Length of a training's longest sequence, in tokens."""
    device: Literal["gpu", "cpu"] | None = None
    memory: Memory | None = None
    """Memory per GPU, or per process without GPUs."""
    disk: int | None = None
    """Peak disk usage of work folder and store, in bytes; None if the data type of the base's files is unknown."""

    @property
    def share(self) -> float | None:
        """Share of trained parameters in all parameters, including the adapter's, as PEFT prints it."""
        if self.trainable is None or self.parameters is None:
            return None
        return 1.0 if self.trainable == self.parameters else self.trainable / (self.parameters + self.trainable)

    def as_json(self) -> dict[str, Any]:
        document = asdict(self) | {"share": self.share}
        if self.memory:
            document["memory"] |= {"total": self.memory.total}
        return document


def estimates(workspace: Workspace, pipeline: str, rows: Sequence[PlanRow]) -> dict[str, Estimate]:
    """Return the estimates of all trainings and merges in a plan, by stage."""
    stages, planned = workspace.loaded.pipeline(pipeline).stages, {row.stage: row for row in rows}
    found = {}
    for name, row in planned.items():
        stage = stages[name]
        if isinstance(stage, Training | MergeStage):
            resumed = None if row.refused else row.checkpoint
            found[name] = estimate(stage, architecture_of(workspace, stages, planned, name), stages, resumed)
    return found


def estimate(
    stage: Training | MergeStage, architecture: Architecture | str, stages: Mapping[str, Stage], checkpoint: Checkpoint | None
) -> Estimate:
    if isinstance(architecture, str):
        return Estimate(unknown=architecture)
    if isinstance(stage, MergeStage):
        return of_merge(architecture, stage)
    job = job_of(architecture, stage, stages)
    return Estimate(
        parameters=architecture.parameters,
        trainable=job.trainable,
        sequence_length=job.length,
        device="gpu" if job.on_gpu else "cpu",
        memory=job.memory(),
        disk=disk_of(job, checkpoint),
    )


def job_of(architecture: Architecture, stage: Training, stages: Mapping[str, Stage]) -> Job:
    return Job(
        architecture,
        stage,
        stage.longest_sequence(row_length(stages[stage.dataset])),
        stage.training_method(),
        stage.base_bits(),
    )


def row_length(dataset: Stage) -> int | None:
    """Return the maximum length of a row in tokens, or None if the dataset stage does not limit it."""
    return dataset.max_length if isinstance(dataset, DatasetStage) else None


def of_merge(architecture: Architecture, stage: MergeStage) -> Estimate:
    """Estimate a merge. It streams weights, but its check holds base and adapter, then the merged model, in float32 on the CPU."""
    dtype = architecture.dtype if stage.dtype == "auto" else stage.dtype
    written = BYTES[dtype] * architecture.parameters if dtype in BYTES else None
    return Estimate(
        parameters=architecture.parameters,
        device="cpu",
        memory=Memory(4 * architecture.parameters, gradients=0, optimizer=0, activations=0, other=PROCESS + (written or 0)),
        disk=written,
    )


def disk_of(job: Job, checkpoint: Checkpoint | None = None) -> int | None:
    """Return the disk usage: checkpoints and the artifact; or, when it resumes from a `checkpoint` of another number of processes, those
    and the converted checkpoint. Ignores tokenizers, which have a few MB."""
    weight, _, state = job.states
    resources = job.stage.resources
    kept = resources.checkpoints_kept + 1  # plus the one in progress
    if job.stage.max_steps and resources.checkpoint_minutes is None and not job.stage.keeps_best():
        kept = min(kept, -(-job.stage.max_steps // resources.checkpoint_steps))
    written = BYTES.get(job.architecture.dtype or "") if job.method == "full" else weight
    if written is None:
        return None
    most = kept * (weight + state) + written
    if checkpoint and job.deepspeed and checkpoint.layout != layout(resources):
        most = max(most, min(kept, resources.checkpoints_kept) * (weight + state) + UNIVERSAL)
    return round(job.trainable * most)
