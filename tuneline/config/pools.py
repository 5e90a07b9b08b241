"""Where and when pipelines run without anybody at a terminal, as types: the part of pipelines.yaml under `pools:` and `schedules:`.

`tuneline deploy` makes Prefect's work pools, queues, deployments and schedules from it. None of it is in any key.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from tuneline.config.cron import wrong
from tuneline.errors import Problem
from tuneline.kinds.fields import Name, Strict

INTERVAL, SIZE = r"^[1-9][0-9]{0,3}[mhd]$", r"^[1-9][0-9]*(Mi|Gi)$"
Size = Annotated[str, Field(pattern=SIZE)]
Override = bool | int | float | str | tuple[bool | int | float | str, ...] | None
UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def interval(text: str) -> datetime.timedelta:
    """Of a text that INTERVAL allows."""
    return datetime.timedelta(**{UNITS[text[-1]]: int(text[:-1])})


class Queue(Strict):
    priority: int = Field(ge=1, le=1000)
    """Runs of the queue with the lowest number start first."""
    concurrency: int | None = Field(None, ge=1)
    """Runs of this queue at the same time; by default as many as the pool allows."""


class Pool(Strict):
    """What every pool has."""

    concurrency: int | None = Field(None, ge=1)
    """Runs at the same time, over all machines that work for the pool."""
    queues: dict[Name, Queue] = {}
    """Queues beside `default`, by name."""
    gpu_memory: Size | None = None
    """Memory of each of its GPUs, as `24Gi` (GiB: a card sold with 24 GB has it). `tuneline plan` warns of trainings that will not fit."""


class ProcessPool(Pool):
    """Runs are processes of a machine on which a worker runs."""

    type: Literal["process"]
    local: bool = True
    """Whether `tuneline up` starts its worker on this machine; otherwise start `tuneline worker POOL` where it should work."""


class DockerPool(Pool):
    """Runs are containers of a machine on which a worker runs."""

    type: Literal["docker"]
    image: str
    """Image with tuneline and its runtimes; infra/docker makes one."""
    gpus: Literal["all"] | Annotated[int, Field(ge=0)] = 0
    """GPUs that a container sees."""
    shm_size: Size = "1Gi"
    """Shared memory of a container; several GPUs talk through it."""
    volumes: tuple[str, ...] = ()
    """`/on/the/machine:/in/the/container`; the project's folder is mounted at its own path anyway."""


class Toleration(Strict):
    key: str
    """Taint of nodes that runs may be placed on all the same."""
    value: str | None = None
    """Its value; any, if left out."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"
    """Its effect."""


class KubernetesPool(Pool):
    """Runs are jobs of a cluster."""

    type: Literal["kubernetes"]
    image: str
    """Image with tuneline and its runtimes; infra/docker makes one."""
    namespace: str = "default"
    """Namespace of the jobs."""
    volume_claim: str
    """Persistent volume claim with the project's folder, mounted at that folder's path: store and checkpoints are shared through it."""
    gpus: int = Field(0, ge=0)
    """GPUs of a job (`nvidia.com/gpu`)."""
    cpu: str = "2"
    """Processors asked for."""
    memory: Size = "8Gi"
    """Memory asked for, and the most that is given."""
    shm_size: Size = "1Gi"
    """Shared memory, taken from the job's memory; several GPUs talk through it."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of nodes that jobs may be placed on all the same."""
    service_account: str | None = None
    """Service account of the jobs."""


AnyPool = Annotated[ProcessPool | DockerPool | KubernetesPool, Field(discriminator="type")]
POOLS: dict[str, type[Pool]] = {"process": ProcessPool, "docker": DockerPool, "kubernetes": KubernetesPool}


class Schedule(Strict):
    """When a deployed pipeline runs by itself: `cron` or `interval`."""

    cron: str | None = None
    """Five fields, as `0 2 * * *`: minute, hour, day of the month, month, day of the week."""
    interval: Annotated[str, Field(pattern=INTERVAL)] | None = None
    """Time between two starts: `30m`, `6h`, `7d`."""
    timezone: str = "UTC"
    """Name of the time zone that cron's hours are in, as `Europe/Berlin`."""
    active: bool = True
    """Whether it starts runs; a schedule may be kept without."""
    catch_up: Literal["latest", "all", "none"] = "latest"
    """Which runs start that were missed while the server or every worker was away: the newest, all, or none that is ten minutes late."""
    queue: Name | None = None
    """Queue of the pipeline's pool, if another than the pipeline's."""
    overrides: dict[str, Override] = {}
    """Fields of stages for these runs: `{sft.lora.r: 32}`."""
    variables: dict[str, bool | int | float | str] = {}
    """Values of `vars` for these runs."""

    def problems(self) -> Iterator[Problem]:
        given = [name for name in ("cron", "interval") if getattr(self, name) is not None]
        if len(given) != 1:
            yield Problem("", f"found {' and '.join(given) or 'neither'}, expected exactly one of cron, interval")
        if self.cron is not None:
            found, hint = wrong(self.cron)
            if found:
                yield Problem("cron", found, hint)
        if self.timezone not in zoneinfo.available_timezones():
            yield Problem("timezone", f"found '{self.timezone}', expected the name of a time zone, as Europe/Berlin")
