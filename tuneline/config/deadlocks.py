"""Detect pools whose slots can all be held by runs that wait for each other.

A deployed run holds a slot of its pool while its stages in other pools wait for slots there. If runs of one pool wait for a second,
and runs of the second for the first, they deadlock once both pools are full.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from tuneline.config.order import cycles
from tuneline.config.spec import Pipeline, Spec
from tuneline.kinds.stage import ProgramStage
from tuneline.wording import listed


def deadlocks(spec: Spec) -> Iterator[tuple[str, str, str]]:
    """Yield (pool, message, hint) for each cycle of pools."""
    waiting = {name: dict(_waiting(spec.pipelines, name)) for name in spec.pools}
    full = {name: [other for other, runs in others.items() if _can_fill(spec, name, runs)] for name, others in waiting.items()}
    for ring in cycles({name: [other for other in others if other in full] for name, others in full.items()}):
        named = " and ".join(f"{name} ({listed(waiting[name][other])})" for name, other in itertools.pairwise(ring))
        runs = sum(_runs(spec.pipelines[each]) for each in waiting[ring[0]][ring[1]])
        found = f"found {spec.pools[ring[0]].concurrency}, with which runs in {named} can hold all slots and wait for each other forever"
        yield ring[0], found, f"set `concurrency` to {runs + 1} or more in one of these pools, or remove it"


def _waiting(pipelines: Mapping[str, Pipeline], pool: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (another pool, the pipelines of `pool` that have stages in it)."""
    here = {name: pipeline for name, pipeline in pipelines.items() if pipeline.pool == pool}
    stages = [(name, stage) for name, pipeline in here.items() for stage in pipeline.stages.values() if isinstance(stage, ProgramStage)]
    for other in dict.fromkeys(stage.pool for _, stage in stages if stage.pool not in (None, pool)):
        if other is not None:
            yield other, list(dict.fromkeys(name for name, stage in stages if stage.pool == other))


def _can_fill(spec: Spec, pool: str, pipelines: list[str]) -> bool:
    places = spec.pools[pool].concurrency
    return places is not None and sum(_runs(spec.pipelines[name]) for name in pipelines) >= places


def _runs(pipeline: Pipeline) -> int:
    """Return the maximum number of concurrent runs of a pipeline: schedules in another queue have their own deployment."""
    own = pipeline.queue or "default"
    return pipeline.concurrency * len({own, *(schedule.queue or own for schedule in pipeline.schedules.values())})
