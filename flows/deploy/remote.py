"""Read the items of a Prefect server, in the form of `flows.deploy.desired`, and create, change and delete them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore

from flows.deploy.desired import FILE_TAG, Item, What, as_schedule, shown_automation, shown_schedule

PAGE = 200  # Prefect's maximum


class Server:
    def __init__(self, client: SyncPrefectClient, tag: str, file: str):
        """Read all items. `tag`: of the pipelines.yaml `file`."""
        self.client, self.tag, self.mark = client, tag, f"Made by `tuneline deploy` from {file} ({tag})."
        self.items: dict[tuple[What, str], Item] = {}
        self._marked: set[tuple[What, str]] = set()
        self._ids: dict[tuple[What, str], Any] = {}
        self._read()

    def is_ours(self, item: Item) -> bool:
        """Return whether the item was created from this file."""
        return (item.what, item.name) in self._marked

    def other_files(self, deployment: Item) -> set[str]:
        """Return the tags of other files that share the deployment."""
        return {tag for tag in deployment.fields["tags"] if tag.startswith(FILE_TAG) and tag != self.tag}

    def users(self, item: Item, leaving: set[str], desired: Mapping[str, Item]) -> list[str]:
        """Return the deployments that stay and use this pool or queue. Those that are `desired` (by name) count with their new fields."""
        if item.what not in ("pool", "queue"):
            return []
        pool, _, queue = item.name.partition("/")
        there = [desired.get(name, each) for (what, name), each in self.items.items() if what == "deployment" and name not in leaving]
        return [each.name for each in there if each.fields["pool"] == pool and queue in ("", each.fields["queue"])]

    # --- reading ------------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for pool in self._pages("/work_pools/filter"):
            shown = {"type": pool["type"], "concurrency": pool["concurrency_limit"], "base_job_template": pool["base_job_template"]}
            self._found(Item("pool", pool["name"], shown), pool["id"], pool["description"])
            for queue in self._pages(f"/work_pools/{pool['name']}/queues/filter"):
                shown = {"priority": queue["priority"], "concurrency": queue["concurrency_limit"]}
                self._found(Item("queue", f"{pool['name']}/{queue['name']}", shown), queue["id"], queue["description"])
        flows = {flow["id"]: flow["name"] for flow in self._pages("/flows/filter")}
        for raw in self._pages("/deployments/filter"):
            deployment = DeploymentResponse.model_validate(raw)
            item = Item("deployment", f"{flows[raw['flow_id']]}/{deployment.name}", _shown_deployment(deployment))
            self._found(item, deployment.id, " ".join(deployment.tags))
        for raw in self._pages("/automations/filter"):
            item = Item("automation", raw["name"], shown_automation(AutomationCore.model_validate(raw)))
            self._found(item, raw["id"], FILE_TAG + raw["name"].rpartition("-")[2] if raw["name"].startswith("tuneline-") else "")

    def _pages(self, path: str) -> Iterator[dict[str, Any]]:
        offset = 0
        while page := self._request("POST", path, {"limit": PAGE, "offset": offset}).json():
            yield from page
            offset += len(page)

    def _found(self, item: Item, id: Any, mark: str | None) -> None:
        key = (item.what, item.name)
        self.items[key], self._ids[key] = item, id
        if self.tag in (mark or ""):
            self._marked.add(key)

    def _request(self, method: Any, path: Any, body: dict[str, Any] | None = None) -> httpx.Response:
        return self.client.request(method, path, json=body)

    # --- creating, changing, deleting ---------------------------------------------------------------------------------------

    def put(self, item: Item) -> None:
        """Create the item, or change it if it exists."""
        makers = {"pool": self._put_pool, "queue": self._put_queue, "deployment": self._put_deployment, "automation": self._put_automation}
        makers[item.what](item, (item.what, item.name) in self.items)

    def put_priority(self, queue: Item) -> None:
        self._request("PATCH", self._queue(queue.name), {"priority": queue.fields["priority"]})

    def delete(self, what: What, name: str) -> None:
        if what == "deployment":
            self.client.delete_deployment(self._ids[(what, name)])
        elif what == "automation":
            self.client.delete_automation(self._ids[(what, name)])
        elif what == "pool":
            self.client.delete_work_pool(name)
        else:
            self._request("DELETE", self._queue(name))

    def _queue(self, full_name: str) -> str:
        pool, _, name = full_name.partition("/")
        return f"/work_pools/{pool}/queues/{name}"

    def _put_pool(self, item: Item, exists: bool) -> None:
        values = {"base_job_template": item.fields["base_job_template"], "concurrency_limit": item.fields["concurrency"]}
        if exists:
            self.client.update_work_pool(item.name, WorkPoolUpdate(**values))
        else:
            self.client.create_work_pool(WorkPoolCreate(name=item.name, type=item.fields["type"], description=self.mark, **values))

    def _put_queue(self, item: Item, exists: bool) -> None:
        pool, _, name = item.name.partition("/")
        values = {"priority": item.fields["priority"], "concurrency_limit": item.fields["concurrency"]}
        if exists or name == "default":  # Prefect creates it with its pool
            self._request("PATCH", self._queue(item.name), values)
        else:
            self._request("POST", f"/work_pools/{pool}/queues", {"name": name, "description": self.mark, **values})

    def _put_deployment(self, item: Item, exists: bool) -> None:
        """Create or update a deployment. Prefect's POST also updates, and unlike PATCH it replaces all schedules."""
        flow, _, name = item.name.partition("/")
        fields = item.fields
        options = {key: value for key, value in (fields["concurrency"] or {}).items() if key != "limit"}
        self.client.create_deployment(
            flow_id=self.client.create_flow_from_name(flow),
            name=name,
            description=fields["description"],
            tags=fields["tags"],
            entrypoint=fields["entrypoint"],
            parameters=fields["parameters"],
            schedules=[
                DeploymentScheduleCreate(slug=slug, schedule=as_schedule(each), active=each["active"], parameters=each["parameters"])
                for slug, each in fields["schedules"].items()
            ],
            concurrency_limit=fields["concurrency"] and fields["concurrency"]["limit"],
            concurrency_options=ConcurrencyOptions(**options) if options else None,
            work_pool_name=fields["pool"],
            work_queue_name=fields["queue"],
            job_variables=fields["job_variables"],
            pull_steps=fields["pull_steps"],
            enforce_parameter_schema=fields["enforce_parameter_schema"],
            parameter_openapi_schema=fields["parameter_openapi_schema"],
        )

    def _put_automation(self, item: Item, exists: bool) -> None:
        automation = AutomationCore(name=item.name, **item.fields)
        if exists:
            self.client.update_automation(self._ids[(item.what, item.name)], automation)
        else:
            self.client.create_automation(automation)


def _shown_deployment(deployment: DeploymentResponse) -> dict[str, Any]:
    limit, options = deployment.global_concurrency_limit, deployment.concurrency_options
    schedules = {
        schedule.slug or str(schedule.id): {
            **shown_schedule(schedule.schedule),
            "active": schedule.active,
            "parameters": schedule.parameters,
        }
        for schedule in deployment.schedules
    }
    return {
        "description": deployment.description,
        "entrypoint": deployment.entrypoint,
        "parameters": deployment.parameters,
        "schedules": schedules,
        "concurrency": {"limit": limit.limit, **(options.model_dump(mode="json") if options else {})} if limit else None,
        "enforce_parameter_schema": deployment.enforce_parameter_schema,
        "parameter_openapi_schema": deployment.parameter_openapi_schema,
        "pool": deployment.work_pool_name,
        "queue": deployment.work_queue_name,
        "tags": sorted(deployment.tags),
        "job_variables": deployment.job_variables,
        "pull_steps": deployment.pull_steps,
    }
