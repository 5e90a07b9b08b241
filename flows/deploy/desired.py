"""The items that a pipelines.yaml defines on a Prefect server, as plain data: pools, queues, deployments with schedules, automations.

This module makes no requests; `flows.deploy.compare` compares the items with those of a server.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

import flows.pipeline
from flows.deploy.pool_templates import base_job_template
from flows.pipeline import DEPLOYED
from tuneline import __version__
from tuneline.config.load import Loaded
from tuneline.config.pools import Schedule, interval
from tuneline.config.spec import Pipeline
from tuneline.config.yaml_source import Keys, dotted
from tuneline.errors import ConfigError, Problem
from tuneline.kinds.stage import ProgramStage

HEARTBEAT_SECONDS = 60  # Prefect's minimum is 30, its default 180
LOST_SECONDS = 3 * HEARTBEAT_SECONDS
PENDING_SECONDS = 1800  # time to provision a GPU node and to pull an image of several GB
PENDING = ("Pending", "Submitting", "InfrastructurePending")  # names of the state in which a run waits for its process
ANCHOR = datetime.datetime(2020, 1, 1)  # start of all intervals; without a fixed one, each deploy would shift them
TAG, FILE_TAG = "tuneline", "tuneline-file:"
RUN_STAGE = "run-stage"

What = Literal["pool", "queue", "deployment", "automation"]


@dataclass(frozen=True)
class Item:
    """One item on a server. `fields` are JSON, with shorter names than Prefect's."""

    what: What
    name: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        """Describe the item in the table of created items."""
        if self.what == "automation":
            return str(self.fields["actions"][0]["message"])
        if self.what == "deployment":
            schedules = (
                f"{name} {each.get('cron') or 'every {:g} h'.format(each['interval'] / 3600)} {each['timezone']}"
                + ("" if each["active"] else " (not active)")
                for name, each in self.fields["schedules"].items()
            )
            return ", ".join([f"pool {self.fields['pool']}", f"queue {self.fields['queue']}", *schedules])
        names = ("type", "priority", "concurrency")
        return ", ".join(f"{name} {self.fields[name]}" for name in names if self.fields.get(name) is not None)


def file_tag(file: Path) -> str:
    """Return the tag of everything that `deploy` creates from this file."""
    return f"{FILE_TAG}{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"


def desired(loaded: Loaded) -> list[Item]:
    """Return the items in an order in which they can be created. Raises ConfigError for what Prefect would reject."""
    _check(loaded)
    deployed = {name: pipeline for name, pipeline in loaded.spec.pipelines.items() if pipeline.pool}
    items = list(_pools(loaded))
    for name, pipeline in deployed.items():
        items += _deployments(loaded, name, pipeline)
    for pool in sorted({pool for pipeline in deployed.values() for pool in other_pools(pipeline)}):
        items.append(_run_stage(loaded, pool))
    return items + (_automations(loaded) if deployed else [])


def other_pools(pipeline: Pipeline) -> set[str]:
    """Return the pools of the pipeline's stages other than its own pool."""
    return {stage.pool for stage in pipeline.stages.values() if isinstance(stage, ProgramStage) and stage.pool} - {pipeline.pool or ""}


# --- pools --------------------------------------------------------------------------------------------------------------


def _pools(loaded: Loaded) -> Iterator[Item]:
    for name, pool in loaded.spec.pools.items():
        template = base_job_template(pool, loaded.root)
        yield Item("pool", name, {"type": pool.type, "concurrency": pool.concurrency, "base_job_template": template})
        for queue_name, queue in sorted(pool.queues.items(), key=lambda pair: pair[1].priority):
            yield Item("queue", f"{name}/{queue_name}", {"priority": queue.priority, "concurrency": queue.concurrency})


# --- deployments --------------------------------------------------------------------------------------------------------


def _deployments(loaded: Loaded, name: str, pipeline: Pipeline) -> Iterator[Item]:
    """Yield NAME/NAME, and NAME/NAME-QUEUE for schedules with another queue: in Prefect, a deployment has a queue, not a schedule."""
    own = pipeline.queue or "default"
    by_queue: dict[str, dict[str, Any]] = {own: {}}
    for key, schedule in pipeline.schedules.items():
        by_queue.setdefault(schedule.queue or own, {})[key] = {
            **shown_schedule(_schedule(schedule)),
            "active": schedule.active,
            "parameters": _parameters(schedule),
        }
    schema = _form()
    for queue, schedules in by_queue.items():
        fields = {
            "description": pipeline.description,
            "entrypoint": f"tuneline.deployed.{name}",
            "parameters": {"pipeline": name, "file": str(loaded.file), **(_of_only(schedules) if queue != own else {})},
            "schedules": schedules,
            # A run that waits for its process holds its slot no longer than the automation below lets it wait.
            "concurrency": {"limit": pipeline.concurrency, "collision_strategy": "ENQUEUE", "grace_period_seconds": PENDING_SECONDS},
            "enforce_parameter_schema": True,
            "parameter_openapi_schema": schema,
        }
        common = _common(loaded, pipeline.pool or "", queue, (name, *pipeline.tags))
        yield Item("deployment", f"{name}/{name}" if queue == own else f"{name}/{name}-{queue}", {**fields, **common})


def _form() -> dict[str, Any]:
    """Return the parameters that the UI asks for: all but the pipeline and the file, which the deployment sets."""
    schema: dict[str, Any] = _json(parameter_schema(flows.pipeline.run_pipeline).model_dump())
    fixed = ("pipeline", "file")
    properties = {name: field for name, field in schema["properties"].items() if name not in fixed}
    return {**schema, "properties": properties, "required": [name for name in schema.get("required", ()) if name not in fixed]}


def _of_only(schedules: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a deployment's only schedule, so that its form in the UI shows them; several schedules may differ."""
    return dict(next(iter(schedules.values()))["parameters"]) if len(schedules) == 1 else {}


def _run_stage(loaded: Loaded, pool: str) -> Item:
    """Return the deployment for the stages that name this pool. The parent run passes their parameters."""
    fields = {
        "description": f"Stages that name the pool `{pool}`, each started by its pipeline's run.",
        "entrypoint": "tuneline.deployed.run_stage",
        "parameters": {},
        "schedules": {},
        "concurrency": None,
        "enforce_parameter_schema": False,
        "parameter_openapi_schema": {"type": "object", "properties": {}},
    }
    return Item("deployment", f"{RUN_STAGE}/{RUN_STAGE}-{pool}", {**fields, **_common(loaded, pool, "default", ())})


def _common(loaded: Loaded, pool: str, queue: str, tags: tuple[str, ...]) -> dict[str, Any]:
    # The version that deployed; a worker compares it with its own.
    environment = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS), DEPLOYED: __version__}
    # Prefect puts this folder first on the path: in the project folder, a user's flows.py or tasks.py would be imported instead of ours.
    step = {"prefect.deployments.steps.set_working_directory": {"directory": "/"}}
    return {
        "pool": pool,
        "queue": queue,
        "tags": sorted({TAG, file_tag(loaded.file), *tags}),
        "job_variables": {"env": environment},
        "pull_steps": [step],
    }


def _parameters(schedule: Schedule) -> dict[str, Any]:
    given = {"overrides": schedule.overrides, "variables": schedule.variables}
    return {name: dict(_json(values)) for name, values in given.items() if values}


def _schedule(schedule: Schedule) -> SCHEDULE_TYPES:
    if schedule.cron is not None:
        return CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    assert schedule.interval is not None
    anchor = ANCHOR.replace(tzinfo=zoneinfo.ZoneInfo(schedule.timezone))
    return IntervalSchedule(interval=interval(schedule.interval), anchor_date=anchor, timezone=schedule.timezone)


def shown_schedule(schedule: SCHEDULE_TYPES) -> dict[str, Any]:
    """Convert a Prefect schedule to JSON, for comparing and showing."""
    if isinstance(schedule, CronSchedule):
        return {"cron": schedule.cron, "timezone": schedule.timezone}
    if isinstance(schedule, IntervalSchedule):
        anchor = schedule.anchor_date.astimezone(datetime.UTC).isoformat()
        return {"interval": schedule.interval.total_seconds(), "timezone": schedule.timezone, "anchor": anchor}
    return dict(schedule.model_dump(mode="json"))


def as_schedule(shown: dict[str, Any]) -> SCHEDULE_TYPES:
    """Convert the JSON of `shown_schedule` to a Prefect schedule."""
    if "cron" in shown:
        return CronSchedule(cron=shown["cron"], timezone=shown["timezone"])
    anchor = datetime.datetime.fromisoformat(shown["anchor"])
    return IntervalSchedule(interval=datetime.timedelta(seconds=shown["interval"]), anchor_date=anchor, timezone=shown["timezone"])


def _check(loaded: Loaded) -> None:
    problems = []
    for name, pipeline in loaded.spec.pipelines.items():
        if pipeline.pool and name in vars(flows.pipeline):  # its entrypoint would resolve to that name
            here: Keys = ("pipelines", name)
            found = f"found the name `{name}`, which flows/pipeline.py uses itself, expected another one for a pipeline with a `pool`"
            problems.append(Problem(dotted(here), found, f"for example `{name}-pipeline`", place=loaded.source.place(here, at_key=True)))
        for key, schedule in pipeline.schedules.items():
            try:
                _schedule(schedule)
            except ValidationError as error:
                path: Keys = ("pipelines", name, "schedules", key, "cron")
                said = error.errors()[0]["msg"].removeprefix("Value error, ")
                hint = "five fields: minute, hour, day of the month, month, day of the week"
                problems.append(Problem(dotted(path), f"found '{schedule.cron}': {said}", hint, place=loaded.source.place(path)))
    if problems:
        raise ConfigError(problems)


# --- automations --------------------------------------------------------------------------------------------------------


def _automations(loaded: Loaded) -> list[Item]:
    tag = file_tag(loaded.file)
    digest = tag.removeprefix(FILE_TAG)
    lost = f"No heartbeat for {LOST_SECONDS} s: the process or its machine is gone, or cannot reach the server."
    waited = f"Not started within {PENDING_SECONDS // 60} minutes: its worker or its machine is gone."
    return [
        crash_after(f"tuneline-lost-{digest}", tag, {"prefect.flow-run.heartbeat"}, LOST_SECONDS, lost),
        crash_after(f"tuneline-pending-{digest}", tag, {f"prefect.flow-run.{name}" for name in PENDING}, PENDING_SECONDS, waited),
    ]


def crash_after(name: str, tag: str, after: set[str], seconds: int, message: str) -> Item:
    """Return an automation that marks a run as crashed when no event follows one of its `after` events in time."""
    trigger = EventTrigger(
        after=after,
        expect={"prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"},
        posture=Posture.Proactive,
        threshold=1,
        within=datetime.timedelta(seconds=seconds),
    )
    action = ChangeFlowRunState(state="CRASHED", name="Crashed", message=message)
    return Item("automation", name, shown_automation(AutomationCore(name=name, trigger=trigger, actions=[action])))


def shown_automation(automation: AutomationCore) -> dict[str, Any]:
    """Convert an automation to JSON for comparing, without the server's ids."""
    fields: dict[str, Any] = automation.model_dump(mode="json", include={"enabled", "trigger", "actions"})
    fields["trigger"].pop("id", None)
    for name in ("after", "expect", "for_each"):  # sets
        fields["trigger"][name] = sorted(fields["trigger"].get(name, ()))
    return fields


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))
