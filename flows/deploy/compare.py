"""`tuneline deploy`: apply pipelines.yaml to a Prefect server, and delete what is no longer in the file.

Items are compared field by field, so that a second deploy changes nothing. What was created from this file carries its tag: deployments
as a tag, pools and queues in their description, automations in their name. Nothing else is ever deleted, and a pool that left the
file only once no deployment uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefect.client.orchestration import get_client

from flows.deploy.desired import RUN_STAGE, TAG, Item, What, desired, file_tag
from flows.deploy.remote import Server
from flows.server.errors import server_errors
from flows.server.waiting import unserved
from tuneline.config.load import Loaded
from tuneline.config.yaml_source import Keys, dotted
from tuneline.errors import ConfigError, Problem

LEAVING = ("automation", "deployment", "queue", "pool")  # order of deletion: a pool after its deployments


@dataclass(frozen=True)
class Difference:
    field: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Row:
    """The action for one item, done or planned. `left`: it is not in the file but stays; `note` says why."""

    what: What
    name: str
    action: Literal["create", "change", "delete", "same", "left"]
    changes: tuple[Difference, ...] = ()
    note: str = ""
    item: Item | None = None
    """The desired item; None if it is not in the file."""


def deploy(loaded: Loaded, dry_run: bool) -> list[Row]:
    """Deploy to the server at PREFECT_API_URL. Raises ConfigError if names are taken, TunelineError if the server rejects a change."""
    items = desired(loaded)
    with server_errors(), get_client(sync_client=True) as client:
        server = Server(client, file_tag(loaded.file), str(loaded.file))
        _refuse_taken(loaded, server, items)
        rows = list(_compared(server, items))
        if not dry_run:
            _apply(server, rows)
    return rows


def idle(loaded: Loaded) -> dict[str, str]:
    """Return the pools of deployments that no worker serves, with the reason."""
    pools = dict.fromkeys(item.fields["pool"] for item in desired(loaded) if item.what == "deployment")
    with server_errors(), get_client(sync_client=True) as client:
        return {pool: reason for pool in pools if (reason := unserved(client, pool))}


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "what": row.what,
            "name": row.name,
            "action": row.action,
            "changes": [{"field": each.field, "old": each.old, "new": each.new} for each in row.changes],
            "note": row.note,
        }
        for row in rows
    ]


def _refuse_taken(loaded: Loaded, server: Server, items: list[Item]) -> None:
    problems = []
    for item in items:
        found = server.items.get((item.what, item.name))
        if found and item.what == "pool" and found.fields["type"] != item.fields["type"]:
            path: Keys = ("pools", item.name, "type")
            message = f"found {item.fields['type']}, but the server has a pool `{item.name}` of type {found.fields['type']}"
            hint = f"a pool keeps its type: choose another name, or `prefect work-pool delete {item.name}`"
            problems.append(Problem(dotted(path), message, hint, place=loaded.source.place(path)))
        if found and item.what == "deployment" and not server.is_ours(found) and not (_shared(item) and TAG in found.fields["tags"]):
            path = ("pipelines", item.name.split("/")[0])
            message = f"found a deployment {item.name} on the server that was not made from this file"
            hint = f"rename the pipeline; or `prefect deployment delete {item.name}`, if a moved file left it behind"
            problems.append(Problem(dotted(path), message, hint, place=loaded.source.place(path, at_key=True)))
    if problems:
        raise ConfigError(problems)


def _compared(server: Server, items: list[Item]) -> Iterator[Row]:
    for item in items:
        found = server.items.get((item.what, item.name))
        if found is None:
            yield Row(item.what, item.name, "create", item=item)
            continue
        if _shared(item):
            item = _with_tags(item, {*item.fields["tags"], *server.other_files(found)})
        changes = tuple(_differences(found.fields, item.fields))
        yield Row(item.what, item.name, "change" if changes else "same", changes, item=item)
    names = {(item.what, item.name) for item in items}
    leaving = [item for key, item in server.items.items() if server.is_ours(item) and key not in names]
    gone = {item.name for item in leaving if item.what == "deployment" and not server.other_files(item)}
    pools = {item.name for item in leaving if item.what == "pool"}
    for item in sorted(leaving, key=lambda item: LEAVING.index(item.what)):
        if item.what == "deployment" and item.name not in gone:
            less = _with_tags(item, {*item.fields["tags"]} - {server.tag})
            yield Row(item.what, item.name, "change", tuple(_differences(item.fields, less.fields)), item=less)
        elif item.what == "queue" and item.name.split("/")[0] in pools:
            continue  # it is deleted, or stays, with its pool
        elif users := server.users(item, gone, {each.name: each for each in items if each.what == "deployment"}):
            yield Row(item.what, item.name, "left", note=f"no longer in the file, but used by {', '.join(users)}")
        else:
            yield Row(item.what, item.name, "delete")


def _shared(item: Item) -> bool:
    """Return whether other files may use the item too: their stages run there."""
    return item.name.startswith(f"{RUN_STAGE}/")


def _with_tags(item: Item, tags: set[str]) -> Item:
    return replace(item, fields={**item.fields, "tags": sorted(tags)})


def _differences(old: Any, new: Any, path: str = "") -> Iterator[Difference]:
    """Yield the differences: of mappings by key, of everything else as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield Difference(path, old, new)


def _apply(server: Server, rows: list[Row]) -> None:
    for row in rows:
        if row.action == "delete":
            server.delete(row.what, row.name)
        elif row.item is not None and row.action in ("create", "change"):
            server.put(row.item)
    # Prefect moves other queues when a priority is taken. Setting all again, highest first, gives each its own in the end.
    touched = {row.name.split("/")[0] for row in rows if row.what == "queue" and row.action in ("create", "change", "delete")}
    for row in rows:
        if row.what == "queue" and row.item is not None and row.name.split("/")[0] in touched:
            server.put_priority(row.item)
