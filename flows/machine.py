"""The GPUs of this machine, and the stages that request them."""

from __future__ import annotations

import os
from pathlib import Path

from tuneline.config.load import Loaded
from tuneline.config.pools import ProcessPool
from tuneline.kinds.stage import ProgramStage

DECLARED = "TUNELINE_GPUS"  # pretended number of GPUs, for tests and dry runs


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    declared = os.environ.get(DECLARED)
    return [str(number) for number in range(int(declared) if declared else len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def gpus_asked(loaded: Loaded) -> list[tuple[str, int, str | None]]:
    """Return (stage, its GPUs, its pool) of all stages that run on this machine, so not of those in pools of other machines."""
    return [
        (f"{pipeline}.{name}", stage.resources.gpus, stage.pool or its.pool)
        for pipeline, its in loaded.spec.pipelines.items()
        for name, stage in its.stages.items()
        if isinstance(stage, ProgramStage) and _here(loaded, stage.pool or its.pool)
    ]


def _here(loaded: Loaded, pool: str | None) -> bool:
    if pool is None:
        return True
    its = loaded.spec.pools[pool]
    return isinstance(its, ProcessPool) and its.local
