"""Compute the layout of the report's pictures: the graph of stages, which the template draws, and line charts (`line_chart.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

NODE, GAP, COLUMN_GAP, MARGIN = 46.0, 16.0, 36.0, 4.0  # px: height of a stage, gap between stages, gap between columns, outer margin
CHARACTER, PADDING, LONGEST = 7.7, 26.0, 26  # px for each letter of a name, px beside it, letters shown
SWEEPS = 4
WIDE = 10.0  # ratio of the highest to the lowest value from which the axis is logarithmic
POINTS = 600  # most points of a line; more cannot be distinguished

Point = tuple[float, float]
Stop = str | tuple[str, str, int]
"""A stage, or where the edge between two stages passes through a column."""


@dataclass(frozen=True)
class Node:
    name: str
    label: str
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Graph:
    width: float
    height: float
    nodes: list[Node]
    edges: list[str]
    """SVG paths."""


def graph(needs: Mapping[str, Sequence[str]]) -> Graph:
    """Lay out stages in columns, each to the right of its upstream stages. `needs` is in execution order.

    Edges that others imply are left out (a needs b, b needs c: a needs c), because the lineage lists them all. The rest is laid out after
    Sugiyama: an edge that skips columns gets a place in each, and neighbors are pulled together.
    """
    needs = _without_implied(needs)
    depth: dict[str, int] = {}
    for name, others in needs.items():
        depth[name] = max((depth[other] + 1 for other in others), default=0)
    columns: list[list[Stop]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    before: dict[Stop, list[Stop]] = {}
    routes: list[list[Stop]] = []
    for name, others in needs.items():
        columns[depth[name]].append(name)
        for other in others:
            route: list[Stop] = [other]
            for column in range(depth[other] + 1, depth[name]):
                route.append((other, name, column))
                columns[column].append((other, name, column))
            routes.append([*route, name])
            for left, right in pairwise(routes[-1]):
                before.setdefault(right, []).append(left)
    _untangle(columns, before)
    middle = _heights(columns, before)
    top = min(middle.values(), default=0.0) - NODE / 2 - MARGIN
    shown = {name: name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in needs}
    widths = [max((_width(shown[stop]) for stop in column if isinstance(stop, str)), default=0.0) for column in columns]
    lefts = [MARGIN + sum(widths[:i]) + COLUMN_GAP * i for i in range(len(columns))]
    place = {stop: i for i, column in enumerate(columns) for stop in column}
    edges = [_path([(lefts[place[stop]], middle[stop] - top, widths[place[stop]]) for stop in route]) for route in routes]
    nodes = [Node(name, shown[name], lefts[depth[name]], middle[name] - top - NODE / 2, widths[depth[name]]) for name in needs]
    width = lefts[-1] + widths[-1] + MARGIN if columns else 0.0
    return Graph(width, max(middle.values(), default=0.0) - top + NODE / 2 + MARGIN, nodes, edges)


def _without_implied(needs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    number = {name: 1 << i for i, name in enumerate(needs)}
    ancestors: dict[str, int] = {}
    kept: dict[str, list[str]] = {}
    for name, others in needs.items():
        far = 0
        for other in others:
            far |= ancestors[other]
        kept[name] = [other for other in dict.fromkeys(others) if not far & number[other]]
        ancestors[name] = far | sum({number[other] for other in others})
    return kept


def _width(label: str) -> float:
    return max(len(label) * CHARACTER + PADDING, 124.0)


def _untangle(columns: list[list[Stop]], before: Mapping[Stop, list[Stop]]) -> None:
    """Order each column by the mean place of its neighbors, in forward and backward sweeps."""
    after: dict[Stop, list[Stop]] = {}
    for stop, others in before.items():
        for other in others:
            after.setdefault(other, []).append(stop)
    place = {stop: float(i) for column in columns for i, stop in enumerate(column)}
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        neighbors = before if forward else after
        for column in columns if forward else reversed(columns):
            wanted = {stop: _mean([place[other] for other in neighbors.get(stop, ())], place[stop]) for stop in column}
            column.sort(key=wanted.__getitem__)
            place |= {stop: float(i) for i, stop in enumerate(column)}


def _heights(columns: list[list[Stop]], before: Mapping[Stop, list[Stop]]) -> dict[Stop, float]:
    """Return the vertical middle of every stop, as near to its upstream stops as its neighbors allow."""
    middle: dict[Stop, float] = {}
    for column in columns:
        wanted = [_mean([middle[other] for other in before.get(stop, ())], i * (NODE + GAP)) for i, stop in enumerate(column)]
        placed: list[float] = []
        for i, (stop, height) in enumerate(zip(column, wanted, strict=True)):
            room = (NODE if isinstance(stop, str) else GAP) / 2
            above = (NODE if i and isinstance(column[i - 1], str) else GAP) / 2
            placed.append(max(height, placed[-1] + above + GAP + room) if placed else height)
        shift = _mean([wish - got for wish, got in zip(wanted, placed, strict=True)], 0.0)
        middle |= {stop: height + shift for stop, height in zip(column, placed, strict=True)}
    return middle


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _path(stops: Sequence[tuple[float, float, float]]) -> str:
    """Return an SVG path through stops (left, middle, width): curved between columns, straight within one."""
    left, y, width = stops[0]
    x = left + width
    path = f"M{x:.1f} {y:.1f}"
    for i, (left, next_y, width) in enumerate(stops[1:], 2):
        bend = (x + left) / 2
        path += f"C{bend:.1f} {y:.1f} {bend:.1f} {next_y:.1f} {left:.1f} {next_y:.1f}"
        if i < len(stops):
            path += f"H{left + width:.1f}"
        x, y = left + width, next_y
    return path


@dataclass(frozen=True)
class Chart:
    """A box of width x height px, its lines, and the positions of the labels along its axes."""

    width: float
    height: float
    lines: dict[str, list[Point]]
    across: list[tuple[float, str]] = field(default_factory=list)
    up: list[tuple[float, str]] = field(default_factory=list)
    log: bool = False
    """Whether the vertical axis is logarithmic."""


def chart(
    lines: Mapping[str, Sequence[Point]], span: tuple[float, float], width: float = 470.0, height: float = 190.0, log: bool = False
) -> Chart:
    """Lay out lines over `span`, the x range that all charts of a figure share. `log` allows a logarithmic axis for a wide range."""
    values = [y for points in lines.values() for _, y in points]
    log = log and min(values) > 0 and max(values) >= WIDE * min(values)
    up = log_numbers(min(values), max(values)) if log else round_numbers(min(values), max(values))
    low, high = min(up[0], *values), max(up[-1], *values)
    scale: Callable[[float], float] = math.log10 if log else float

    def x_of(x: float) -> float:
        return round((x - span[0]) / ((span[1] - span[0]) or 1.0) * width, 1)

    def y_of(y: float) -> float:
        return round(height - (scale(y) - scale(low)) / ((scale(high) - scale(low)) or 1.0) * height, 1)

    drawn = {name: [(x_of(x), y_of(y)) for x, y in _thinned(points)] for name, points in lines.items() if points}
    across = [(x_of(x), f"{x:,.0f}") for x in round_numbers(*span) if span[0] <= x <= span[1] and x == round(x)]
    return Chart(width, height, drawn, across, [(y_of(y), f"{y:.4g}") for y in up], log)


def _thinned(points: Sequence[Point]) -> list[Point]:
    step = -(-len(points) // POINTS)
    return [*points[:-1:step], points[-1]] if points else []


def round_numbers(low: float, high: float, about: int = 4) -> list[float]:
    """Return numbers 1, 2 or 5 times a power of ten apart, which cover `low` to `high`."""
    if high <= low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten (only the powers beyond a factor of 100), which cover `low` to `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high <= 100 * low else (1,)
    numbers = sorted({float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors})
    least = max(number for number in numbers if number <= low)
    most = min(number for number in numbers if number >= high)
    return [number for number in numbers if least <= number <= most]
