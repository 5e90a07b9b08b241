"""Finds what `chat` and `serve` use: the artifact of a stage under the file's current settings, and how the pipeline evaluates it.

A model is used as it was measured: by the runtime, on the devices and with the data type of the first stage that evaluates it. Without
such a stage, those of the stage that built it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tuneline.config.order import in_order
from tuneline.config.overrides import as_flags
from tuneline.errors import ConfigError, Problem
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.fields import ArtifactType
from tuneline.kinds.stage import ComputingStage, ProgramStage
from tuneline.planning.plan import PlanRow, plan
from tuneline.wording import listed, nearest
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.file_names import PAYLOAD
from tuneline.workspace.history import input_of
from tuneline.workspace.protocol import Input, Request
from tuneline.workspace.workspace import Workspace

MODELS: tuple[ArtifactType, ...] = ("Model", "Adapter")


@dataclass(frozen=True)
class Built:
    """A model or an adapter in the store."""

    name: str
    """PIPELINE/STAGE."""
    stage: ProgramStage
    artifact: Artifact
    evaluation: EvaluateStage
    """How it is used."""

    @property
    def pipeline(self) -> str:
        return self.name.partition("/")[0]


def find_model(workspace: Workspace, named: str, dataset: str | None = None) -> Built:
    """Return the model of a stage; of a pipeline's last one if only a pipeline is named. Raises ConfigError unless it is built.

    `dataset`: a stage whose rows it will be asked; it is asked as in the evaluation on that dataset.
    """
    pipeline_name, _, stage_name = named.partition("/")
    stages = workspace.loaded.pipeline(pipeline_name).stages
    models = [name for name in in_order(workspace.loaded.pipeline(pipeline_name)) if stages[name].output_type() in MODELS]
    if not models:
        raise ConfigError([Problem("", "found no stage that builds a model or an adapter", place=pipeline_name)])
    stage_name = stage_name or models[-1]
    if stage_name not in models:
        found = f"found `{stage_name}`, expected a stage that builds a model or an adapter: {listed(models)}"
        raise ConfigError([Problem("", found, nearest(stage_name, models), place=named)])
    stage = stages[stage_name]
    assert isinstance(stage, ProgramStage)
    artifact = find_artifact(workspace, pipeline_name, stage_name)
    evaluations = [each for each in stages.values() if isinstance(each, EvaluateStage) and each.model == stage_name]
    evaluations.sort(key=lambda each: dataset not in each.datasets)
    return Built(f"{pipeline_name}/{stage_name}", stage, artifact, evaluations[0] if evaluations else _as_built(stage_name, stage))


def find_artifact(workspace: Workspace, pipeline: str, stage: str) -> Artifact:
    """Return a stage's artifact. Raises ConfigError, with the command that builds it, if there is none under the current settings."""
    rows = plan(workspace, pipeline, only=stage)
    row, artifact = rows[-1], rows[-1].artifact
    if row.status == "unknown" and not _differs(rows):  # only the commit of a branch on the hub is unknown: the last run looked it up
        last = workspace.runs.last_success(pipeline, {stage}).get(stage)
        artifact = workspace.store.find(last.kind, last.key) if last and last.key else None
    if artifact is None:
        why = "; ".join(reason.text for reason in row.reasons)
        raise ConfigError(
            [Problem("", f"found nothing built ({why})", f"`{_run(workspace, pipeline, stage)}` builds it", f"{pipeline}/{stage}")]
        )
    return artifact


def find_dataset(workspace: Workspace, pipeline: str, stage: str) -> Artifact:
    """Return the rows of a dataset's stage. Raises ConfigError unless it is one, and built."""
    stages = workspace.loaded.pipeline(pipeline).stages
    datasets = [name for name, each in stages.items() if each.output_type() == "Dataset"]
    if stage not in datasets:
        found = f"found `{stage}`, expected a dataset of {pipeline}: {listed(datasets)}"
        raise ConfigError([Problem("", found, nearest(stage, datasets), place="--dataset")])
    return find_artifact(workspace, pipeline, stage)


def request_of(built: Built, inputs: dict[str, Input], folder: Path, engine: Path | None = None) -> Request:
    """Return the request of a program that uses the model in `folder`: that of its evaluation, with other inputs."""
    stage = built.evaluation
    return Request(
        kind=stage.kind, key=built.artifact.key, config=stage.model_dump(mode="json") | stage.decided(), seed=stage.seed, inputs=inputs,
        files={}, commits={}, out=folder / PAYLOAD, work=folder, attempt=1, resources=stage.resources.model_dump(mode="json"),
        engine=engine, name=built.name,
    )  # fmt: skip


def input_of_model(workspace: Workspace, built: Built) -> Input:
    return input_of(workspace.store, built.artifact)


def _differs(rows: list[PlanRow]) -> bool:
    """Return whether one of the stages differs from its last run in what is known without the hub."""
    reasons = [reason for row in rows for reason in row.reasons]
    return any(row.problems for row in rows) or any(reason.code != "input" or reason.new is not None for reason in reasons)


def _as_built(name: str, stage: ProgramStage) -> EvaluateStage:
    gpus = min(1, stage.resources.gpus)
    resources = EvaluateStage.model_fields["resources"].default.model_copy(update={"gpus": gpus})
    dtype = stage.dtype if isinstance(stage, ComputingStage) else "auto"
    return EvaluateStage(kind="evaluate", model=name, runtime=stage.runtime, resources=resources, dtype=dtype)


def _run(workspace: Workspace, pipeline: str, stage: str) -> str:
    file = workspace.loaded.file
    others = [*(["--file", str(file)] if file.name != "pipelines.yaml" else []), *as_flags(workspace.loaded.overrides)]
    return shlex.join(["tuneline", "run", pipeline, "--only", stage, *others])
