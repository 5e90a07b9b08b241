"""Types of work pools and schedules: the parts of pipelines.yaml under `pools:` and `schedules:`.

`tuneline deploy` creates Prefect's work pools, queues, deployments and schedules from them. None of it is in any key.
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
    """Parse a text that matches INTERVAL."""
    return datetime.timedelta(**{UNITS[text[-1]]: int(text[:-1])})


class Queue(Strict):
    priority: int = Field(ge=1, le=1000)
    """Priority of the queue: runs of the queue with the lowest number start first."""
    concurrency: int | None = Field(None, ge=1)
    """Maximum number of runs of this queue at the same time; by default the pool's limit."""


class Pool(Strict):
    """Fields that every pool has."""

    concurrency: int | None = Field(None, ge=1)
    """Maximum number of runs at the same time, over all machines of the pool."""
    queues: dict[Name, Queue] = {}
    """Queues in addition to `default`, by name."""
    gpu_memory: Size | None = None
    """Memory of each GPU of the pool, such as `24Gi` (GiB; a card sold as 24 GB has 24Gi). `tuneline plan` warns about trainings that will
    not fit."""


class ProcessPool(Pool):
    """Runs are processes on the machine of a worker."""

    type: Literal["process"]
    local: bool = True
    """Whether `tuneline up` starts a worker on this machine. If false, run `tuneline worker POOL` on another machine."""


class DockerPool(Pool):
    """Runs are containers on the machine of a worker."""

    type: Literal["docker"]
    image: str
    """Container image with tuneline and its runtimes; infra/docker builds one."""
    gpus: Literal["all"] | Annotated[int, Field(ge=0)] = 0
    """Number of GPUs visible in a container."""
    shm_size: Size = "1Gi"
    """Shared memory of a container; processes on several GPUs communicate through it."""
    volumes: tuple[str, ...] = ()
    """Volumes as `/on/the/machine:/in/the/container`; the project's folder is always mounted at its own path."""


class Toleration(Strict):
    key: str
    """Key of the tolerated node taint."""
    value: str | None = None
    """Value of the taint; by default any value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"
    """Effect of the taint."""


class KubernetesPool(Pool):
    """Runs are jobs on a Kubernetes cluster."""

    type: Literal["kubernetes"]
    image: str
    """Container image with tuneline and its runtimes; infra/docker builds one."""
    namespace: str = "default"
    """Namespace of the jobs."""
    volume_claim: str
    """Persistent volume claim with the project's folder, mounted at that folder's path; jobs share the store and checkpoints through it."""
    gpus: int = Field(0, ge=0)
    """Number of GPUs per job (`nvidia.com/gpu`)."""
    cpu: str = "2"
    """CPU request of a job."""
    memory: Size = "8Gi"
    """Memory request and limit of a job."""
    shm_size: Size = "1Gi"
    """Shared memory of a job, part of its memory; processes on several GPUs communicate through it."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Node taints that the jobs tolerate."""
    service_account: str | None = None
    """Service account of the jobs."""


AnyPool = Annotated[ProcessPool | DockerPool | KubernetesPool, Field(discriminator="type")]
POOLS: dict[str, type[Pool]] = {"process": ProcessPool, "docker": DockerPool, "kubernetes": KubernetesPool}


class Schedule(Strict):
    """A schedule that starts runs of a deployed pipeline: `cron` or `interval`."""

    cron: str | None = None
    """Cron expression of five fields: minute, hour, day of month, month, day of week, such as `0 2 * * *`."""
    interval: Annotated[str, Field(pattern=INTERVAL)] | None = None
    """Time between two starts, such as `30m`, `6h` or `7d`."""
    timezone: str = "UTC"
    """Time zone of the cron expression, such as `Europe/Berlin`."""
    active: bool = True
    """Whether the schedule starts runs; set it to false to pause the schedule."""
    catch_up: Literal["latest", "all", "none"] = "latest"
    """Which missed runs to start after the server or all workers were down: the latest, all, or none (if over ten minutes late)."""
    queue: Name | None = None
    """Queue of the pipeline's pool; by default the pipeline's `queue`."""
    overrides: dict[str, Override] = {}
    """Overrides of stage fields for the scheduled runs, such as `{sft.lora.r: 32}`."""
    variables: dict[str, bool | int | float | str] = {}
    """Overrides of `vars` for the scheduled runs."""

    def problems(self) -> Iterator[Problem]:
        given = [name for name in ("cron", "interval") if getattr(self, name) is not None]
        if len(given) != 1:
            yield Problem("", f"found {' and '.join(given) or 'neither'}, expected exactly one of cron, interval")
        if self.cron is not None:
            found, hint = wrong(self.cron)
            if found:
                yield Problem("cron", found, hint)
        if self.timezone not in zoneinfo.available_timezones():
            yield Problem("timezone", f"found '{self.timezone}', expected a time zone, such as Europe/Berlin")
