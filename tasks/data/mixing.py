"""Chooses how many rows of each source are used, and how often: `max_rows`, `repeat` and `weight` of a source.

    read -> ... -> deduplicate -> max_rows -> split -> repeat or weight (train only) -> write

Rows are drawn by a hash of the seed, the source and the row, so a row's fate does not depend on the rows around it, and more rows of a
file replace few of those drawn before. The hash is another one than that of the split.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from tasks.data.sources import AnySource, Counts, Item


def limited(items: list[Item], sources: Sequence[AnySource], seed: int, counts: Counts) -> list[Item]:
    """Return at most `max_rows` rows of each source, in the order in which they were read."""
    dropped = set[int]()
    for name, places in by_source(items).items():
        most = source_of(name, sources).max_rows
        if most is not None:
            dropped.update(in_order_drawn(f"max_rows:{seed}", items, places)[most:])
    return kept(items, dropped, counts)


def mixed(items: list[Item], sources: Sequence[AnySource], seed: int, counts: Counts) -> list[Item]:
    """Return the rows of the train split, each as often as its source says, copies after one another."""
    if not any(source.weight for source in sources):
        return [item for item in items for _ in range(source_of(item.row.source, sources).repeat)]
    places = by_source(items)
    wanted = shares([source.weight or 0.0 for source in sources], len(items))
    times = [0] * len(items)
    for index, target in enumerate(wanted):
        own = places.get(f"sources.{index}", [])
        whole, more = divmod(target, len(own)) if own else (0, 0)
        for number, place in enumerate(in_order_drawn(f"weight:{seed}", items, own)):
            times[place] = whole + (number < more)
    used = kept(items, {place for place, count in enumerate(times) if not count}, counts)
    often = iter(count for count in times if count)
    return [item for item in used for _ in range(next(often))]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` in proportion to the weights: rounded down, and the rest to those with the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    for index in sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))[: total - sum(found)]:
        found[index] += 1
    return found


def by_source(items: list[Item]) -> dict[str, list[int]]:
    """Return the places of the rows of each source."""
    found = defaultdict[str, list[int]](list)
    for place, item in enumerate(items):
        found[item.row.source].append(place)
    return found


def source_of(name: str, sources: Sequence[AnySource]) -> AnySource:
    return sources[int(name.partition(".")[2])]


def in_order_drawn(draw: str, items: list[Item], places: list[int]) -> list[int]:
    """Return the places in an order that only the draw and each row decide; equal rows in the order of reading."""

    def key(place: int) -> tuple[bytes, int]:
        row = items[place].row
        return hashlib.sha256(f"{draw}:{row.source}:{row.id}".encode()).digest(), place

    return sorted(places, key=key)


def kept(items: list[Item], dropped: set[int], counts: Counts) -> list[Item]:
    for place in dropped:
        counts.fates["not_drawn", items[place].row.source] += 1
    return [item for place, item in enumerate(items) if place not in dropped]
