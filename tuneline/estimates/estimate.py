"""What trainings and merges will take, for `tuneline plan`: parameters, memory of each device, disk. Imports no torch, reads no weight."""

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

UNIVERSAL = 2 * 12  # bytes of a trained parameter that DeepSpeed's converter writes: its states by process, then those by parameter


@dataclass(frozen=True)
class Estimate:
    unknown: str = ""
    """Why nothing can be said; then all the others are None."""
    parameters: int | None = None
    """Of the model that is trained or written, without an adapter."""
    trainable: int | None = None
    """Parameters that are trained; None for a merge."""
    sequence_length: int | None = None
    """Tokens of a training's longest sequence."""
    device: Literal["gpu", "cpu"] | None = None
    memory: Memory | None = None
    """Of each GPU, or of each process where there is none."""
    disk: int | None = None
    """Most bytes at once, in work folder and store; None where the type of the base's files is not known."""

    @property
    def share(self) -> float | None:
        """Of what is trained in all parameters, the adapter's among them, as PEFT prints it."""
        if self.trainable is None or self.parameters is None:
            return None
        return 1.0 if self.trainable == self.parameters else self.trainable / (self.parameters + self.trainable)

    def as_json(self) -> dict[str, Any]:
        document = asdict(self) | {"share": self.share}
        if self.memory:
            document["memory"] |= {"total": self.memory.total}
        return document


def estimates(workspace: Workspace, pipeline: str, rows: Sequence[PlanRow]) -> dict[str, Estimate]:
    """Of every training and merge among the rows of a plan, by stage."""
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
    """Return the most tokens of a row, or None where the dataset stage does not bound them."""
    return dataset.max_length if isinstance(dataset, DatasetStage) else None


def of_merge(architecture: Architecture, stage: MergeStage) -> Estimate:
    """The merge itself streams; its check holds base and adapter, then the merged model, in float32 on the CPU, beside the file."""
    dtype = architecture.dtype if stage.dtype == "auto" else stage.dtype
    written = BYTES[dtype] * architecture.parameters if dtype in BYTES else None
    return Estimate(
        parameters=architecture.parameters,
        device="cpu",
        memory=Memory(4 * architecture.parameters, gradients=0, optimizer=0, activations=0, other=PROCESS + (written or 0)),
        disk=written,
    )


def disk_of(job: Job, checkpoint: Checkpoint | None = None) -> int | None:
    """Checkpoints of trained weights and optimizer states, and the artifact; or, while it begins from a `checkpoint` of other processes,
    those and what that one is put together to. Tokenizers, of a few MB, are left out."""
    weight, _, state = job.states
    resources = job.stage.resources
    kept = resources.checkpoints_kept + 1  # and the one that is being written
    if job.stage.max_steps and resources.checkpoint_minutes is None and not getattr(job.stage, "early_stopping", None):
        kept = min(kept, -(-job.stage.max_steps // resources.checkpoint_steps))
    written = BYTES.get(job.architecture.dtype or "") if job.method == "full" else weight
    if written is None:
        return None
    most = kept * (weight + state) + written
    if checkpoint and job.deepspeed and checkpoint.layout != layout(resources):
        most = max(most, min(kept, resources.checkpoints_kept) * (weight + state) + UNIVERSAL)
    return job.trainable * most
