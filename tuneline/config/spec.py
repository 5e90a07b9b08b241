"""pipelines.yaml as types: the whole file format. Stage kinds are in `tuneline.kinds`, one file each.

A field's description says its effect. `Reference` marks a field that names another stage; `OutsideFile` one that names a
file or folder beside pipelines.yaml. Everything in `Stage` (the base class) only changes how a stage runs and is never in
its key; everything a kind adds changes the result and is. Checks that need more than one field are `problems()`; those that
need more than one stage are in `tuneline.config.checks`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from tuneline.config.pools import INTERVAL, AnyPool, Schedule
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.fields import Name, Path, Strict
from tuneline.kinds.gate import GateStage
from tuneline.kinds.grpo import GrpoStage
from tuneline.kinds.merge import MergeStage
from tuneline.kinds.model import ModelStage
from tuneline.kinds.quantize import QuantizeStage
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import ProgramStage, Stage

AnyStage = Annotated[
    ModelStage | DatasetStage | SftStage | GrpoStage | EvaluateStage | MergeStage | QuantizeStage | GateStage, Field(discriminator="kind")
]
STAGES: dict[str, type[Stage]] = {get_args(stage.model_fields["kind"].annotation)[0]: stage for stage in get_args(get_args(AnyStage)[0])}
PROGRAM_STAGES = {kind: stage for kind, stage in STAGES.items() if issubclass(stage, ProgramStage)}
"""Kinds that a program carries out: all but the gate."""


class Runtime(Strict):
    """A Python environment: a lock file that tuneline installs, or a Python that is there already."""

    lock: Path | None = None
    """Lock file, relative to pipelines.yaml."""
    python: str | None = None
    """Python of an environment of your own."""


class Pipeline(Strict):
    description: str = ""
    """Shown in tables and reports."""
    salt: str = ""
    """Changing it disowns every earlier artifact of this pipeline."""
    parallel: int | None = Field(None, ge=1)
    """Stages that may run at the same time; by default one for each GPU of the machine, or one."""
    pool: Name | None = None
    """Pool that it runs in once deployed. Without one it is not deployed."""
    queue: Name | None = None
    """Queue of that pool."""
    concurrency: int = Field(1, ge=1)
    """Runs of its deployment that may work at the same time; further ones wait."""
    tags: tuple[str, ...] = ()
    """Tags of its runs in Prefect, beside its name."""
    schedules: dict[Name, Schedule] = {}
    """When it runs by itself, by name."""
    stages: dict[Name, AnyStage] = Field(min_length=1)
    """Stages by name; order is free."""


class Spec(Strict):
    """A whole pipelines.yaml."""

    version: Literal[1]
    """Version of this file format."""
    store: str = ".tuneline/store"
    """Folder of artifacts."""
    roots: tuple[str, ...] = ()
    """Folders outside of this file's own that its paths may lead into, such as `/data/models`."""
    history: Annotated[str, Field(pattern=INTERVAL)] = "90d"
    """How long runs that have ended are kept: by servers that tuneline starts, and as records by `tuneline gc`: `12h`, `30d`."""
    vars: dict[str, bool | int | float | str] = {}
    """Values for `${name}` anywhere in the file."""
    runtimes: dict[Name, Runtime] = {}
    """Environments beside the built-in ones."""
    pools: dict[Name, AnyPool] = {}
    """Work pools of Prefect, made by `tuneline deploy`."""
    pipelines: dict[Name, Pipeline] = Field(min_length=1)
    """Pipelines by name."""
