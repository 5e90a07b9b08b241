"""The file format of pipelines.yaml as types. Stage kinds are in `tuneline.kinds`, one file each.

A field's description states its effect. `Reference` marks a field that names another stage, `OutsideFile` one that names a
file or folder outside of the store. Fields of `Stage` (the base class) only change how a stage runs and are never in its key.
Fields that a kind adds change the result and are in the key. Checks of several fields are in `problems()`, checks of several
stages in `upstream_problems()` and `tuneline.config.checks`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from tuneline.config.pools import INTERVAL, AnyPool, Schedule
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.dpo import DpoStage
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.export import ExportStage
from tuneline.kinds.fields import ExternalPath, Name, Strict
from tuneline.kinds.gate import GateStage
from tuneline.kinds.grpo import GrpoStage
from tuneline.kinds.kto import KtoStage
from tuneline.kinds.merge import MergeStage
from tuneline.kinds.model import ModelStage
from tuneline.kinds.quantize import QuantizeStage
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import ProgramStage, Stage
from tuneline.kinds.trackers import Track

AnyTraining = SftStage | DpoStage | KtoStage | GrpoStage
AnyStage = Annotated[
    ModelStage | DatasetStage | AnyTraining | EvaluateStage | MergeStage | QuantizeStage | ExportStage | GateStage,
    Field(discriminator="kind"),
]
STAGES: dict[str, type[Stage]] = {get_args(stage.model_fields["kind"].annotation)[0]: stage for stage in get_args(get_args(AnyStage)[0])}
PROGRAM_STAGES = {kind: stage for kind, stage in STAGES.items() if issubclass(stage, ProgramStage)}
"""Kinds that run a program: all except the gate."""


class Runtime(Strict):
    """A Python environment: a lock file that tuneline installs, or an existing Python interpreter."""

    lock: ExternalPath | None = None
    """Lock file to install, relative to pipelines.yaml."""
    python: str | None = None
    """Python interpreter of an existing environment."""


class Pipeline(Strict):
    description: str = ""
    """Description shown in tables and reports."""
    salt: str = ""
    """Text added to every cache key of this pipeline; change it to rebuild all stages."""
    parallel: int | None = Field(None, ge=1)
    """Maximum number of stages that run at the same time; by default one per GPU of the machine, or one without GPUs."""
    pool: Name | None = None
    """Work pool that the deployed pipeline runs in. A pipeline without a pool is not deployed."""
    queue: Name | None = None
    """Queue of the pool."""
    concurrency: int = Field(1, ge=1)
    """Maximum number of runs of the deployment at the same time; further runs wait."""
    tags: tuple[str, ...] = ()
    """Tags of the pipeline's runs in Prefect, in addition to its name."""
    schedules: dict[Name, Schedule] = {}
    """Schedules of the deployed pipeline, by name."""
    track: Track | None = None
    """Trackers that show the curves of the pipeline's trainings; in no key."""
    stages: dict[Name, AnyStage] = Field(min_length=1)
    """Stages by name, in any order."""


class Spec(Strict):
    """A whole pipelines.yaml."""

    version: Literal[1]
    """Version of this file format."""
    store: str = ".tuneline/store"
    """Folder that stores artifacts."""
    roots: tuple[str, ...] = ()
    """Folders that paths in this file may lead into, in addition to the file's own folder, such as `/data/models`."""
    history: Annotated[str, Field(pattern=INTERVAL)] = "90d"
    """How long ended runs are kept, such as `12h` or `30d`: on servers started by tuneline, and as run records by `tuneline gc`."""
    vars: dict[str, bool | int | float | str] = {}
    """Values for `${name}` anywhere in the file."""
    runtimes: dict[Name, Runtime] = {}
    """Python environments in addition to the built-in ones, by name."""
    pools: dict[Name, AnyPool] = {}
    """Work pools of Prefect by name, created by `tuneline deploy`."""
    pipelines: dict[Name, Pipeline] = Field(min_length=1)
    """Pipelines by name."""
