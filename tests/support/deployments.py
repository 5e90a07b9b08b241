"""A file with deployments, and the tests' server on which they are made."""

from __future__ import annotations

from typing import Any

PIPELINES = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
vars: {rows: one}
pools:
  local: {type: process, concurrency: 4, queues: {interactive: {priority: 1}, nightly: {priority: 10, concurrency: 1}}}
  boxes: {type: docker, image: "tuneline:1", gpus: 2}
pipelines:
  pico:
    description: Small.
    pool: local
    queue: interactive
    tags: [mine]
    schedules:
      night: {cron: 0 2 * * *, timezone: Europe/Berlin, queue: nightly, overrides: {one.seed: 7}, variables: {rows: one}}
      often: {interval: 6h, active: false}
    stages:
      one:  {kind: dataset, runtime: stand-in, sources: [{type: files, path: "${rows}.txt"}]}
      two:  {kind: dataset, runtime: stand-in, sources: [{type: files, path: two.txt}], needs: [one]}
      gate: {kind: gate, require: [{metric: figure, of: two, at_least: 0.5}]}
  other:
    pool: local
    schedules: {weekly: {interval: 7d, overrides: {one.seed: 1}}}
    stages:
      one: {kind: dataset, runtime: stand-in, pool: boxes, sources: [{type: files, path: other.txt}]}
  here:
    stages:
      one: {kind: dataset, runtime: stand-in, sources: [{type: files, path: other.txt}]}
"""


def empty() -> None:
    with server() as client:
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
        for automation in client.read_automations():
            client.delete_automation(automation.id)
        for pool in client.read_work_pools():
            client.delete_work_pool(pool.name)


def server() -> Any:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def deployed() -> dict[str, Any]:
    with server() as client:
        return {f"{client.read_flow(each.flow_id).name}/{each.name}": each for each in client.read_deployments()}
