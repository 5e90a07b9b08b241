"""Order of stages. Nothing here recurses: a pipeline may be a chain of a thousand stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from tuneline.config.spec import Pipeline
from tuneline.kinds.fields import Reference, annotated_values
from tuneline.kinds.stage import Stage


def depends_on(stage: Stage) -> list[str]:
    """Return the names of the stages that must run first, each once, in the order of the fields."""
    return list(dict.fromkeys(target for _, _, target in annotated_values(stage, Reference)))


def in_order(pipeline: Pipeline) -> list[str]:
    """Return stage names in topological order, otherwise as written."""
    needs = {name: depends_on(stage) for name, stage in pipeline.stages.items()}
    done: dict[str, None] = {}
    for first in needs:
        waiting = [first]
        while waiting:
            missing = [need for need in needs[waiting[-1]] if need not in done]
            if missing:
                waiting.append(missing[0])
            else:
                done.setdefault(waiting.pop())
    return list(done)


def with_ancestors(pipeline: Pipeline, name: str) -> set[str]:
    """Return the stage and all its transitive dependencies."""
    found = {name}
    waiting = [name]
    while waiting:
        for other in depends_on(pipeline.stages[waiting.pop()]):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def cycles(needs: Mapping[str, Sequence[str]]) -> Iterable[list[str]]:
    """Yield cycles as [a, b, a], where a needs b. Each starts with its first stage in `needs`."""
    graph = {name: list(others) for name, others in needs.items()}
    position = {name: i for i, name in enumerate(graph)}
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return
        except CycleError as error:
            ring = list(reversed(error.args[1]))[1:]
            start = ring.index(min(ring, key=position.__getitem__))
            ring = ring[start:] + ring[:start]
            yield [*ring, ring[0]]
            graph[ring[0]].remove(ring[1])
