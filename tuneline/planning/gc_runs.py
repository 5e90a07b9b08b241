"""Select the runs whose artifacts `tuneline gc` keeps, and the run records to remove: older than `history`, naming nothing that is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tuneline.workspace.runs import RunRecord, Runs


@dataclass(frozen=True)
class Policy:
    keep_last: int
    older_than: timedelta | None = None
    everything: bool = False


def kept(records: Iterable[RunRecord], policy: Policy, runs: Runs) -> dict[str, str]:
    """Return why each kept run is kept, by run id. `records` and the result are newest first."""
    records = list(records)
    alive = {record.pipeline for record in records if runs.alive(record)}
    seen: dict[str, int] = {}
    completed: set[str] = set()
    found: dict[str, str] = {}
    for record in records:
        pipeline = record.pipeline
        seen[pipeline] = seen.get(pipeline, 0) + 1
        if pipeline in alive:
            found[record.run_id] = f"{pipeline} is running now"
        elif seen[pipeline] <= policy.keep_last:
            found[record.run_id] = f"run {record.run_id}, one of the last {policy.keep_last}"
        elif pipeline not in completed and record.state == "completed":
            found[record.run_id] = f"run {record.run_id}, the last that completed"
        elif pipeline not in completed and record.state != "refused":
            found[record.run_id] = f"run {record.run_id}, {record.state} and none has completed since"
        elif policy.older_than and _age(record) < policy.older_than:
            found[record.run_id] = f"run {record.run_id}, younger than {days(policy.older_than)}"
        if record.state == "completed":
            completed.add(pipeline)
    return found


def spent(records: Iterable[RunRecord], stay: Set[str], left: Set[str], history: timedelta) -> Iterator[tuple[RunRecord, timedelta]]:
    """Yield records that may be removed, with their ages. `stay`: ids of kept runs; `left`: `kind/key` of remaining artifacts.

    A record stays as long as an artifact that only it names, because it shows that the artifact belongs to this workspace.
    """
    records = list(records)
    known = {name for record in records if record.run_id in stay for name in names(record)}
    for record in records:
        age = _age(record)
        if record.run_id not in stay and record.state != "running" and age > history and not (names(record) & left) - known:
            yield record, age


def names(record: RunRecord) -> set[str]:
    """Return `kind/key` of each stage of a run."""
    return {f"{stage.kind}/{stage.key}" for stage in record.stages if stage.key}


def days(age: timedelta) -> str:
    return f"{age.total_seconds() / 86400:g} d"


def _age(record: RunRecord) -> timedelta:
    return datetime.now(UTC) - datetime.fromisoformat(record.started)
