"""`tuneline deploy` against a real server."""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from deployments import PIPELINES, deployed, empty, server
from processes import PATIENCE, until
from project import Project, shadow

from tuneline import __version__


@pytest.fixture
def pico(project: Project, stand_in: Callable[..., None], prefect_server: str) -> Iterator[Project]:
    """A project with a server that is emptied afterwards."""
    project.write(PIPELINES)
    shadow(project.root, "flows", "tasks")
    for name in ("one", "two", "other"):
        project.write(name, f"{name}.txt")
    yield project
    empty()


def actions(document: Any) -> dict[str, str]:
    return {
        f"{item['what']} {item['name'].rpartition('-')[0] if item['what'] == 'automation' else item['name']}": item["action"]
        for item in document["items"]
    }


def queues(pool: str) -> dict[str, tuple[int, int | None]]:
    with server() as client:
        found = client.request("POST", f"/work_pools/{pool}/queues/filter", json={}).json()
    return {queue["name"]: (queue["priority"], queue["concurrency_limit"]) for queue in found}


ALL = [
    "pool local",
    "queue local/interactive",
    "queue local/nightly",
    "pool boxes",
    "deployment pico/pico-nightly",
    "deployment pico/pico",
    "deployment other/other",
    "deployment run-stage/run-stage-boxes",
    "automation tuneline-lost",
    "automation tuneline-pending",
]


@pytest.mark.slow
def test_the_server_says_what_the_file_says_and_a_second_deploy_changes_nothing(pico: Project) -> None:
    assert actions(pico.json("deploy", "--dry-run")) == dict.fromkeys(ALL, "create")
    assert deployed() == {}
    made = pico.tuneline("deploy")
    assert "10 created" in made.stderr
    rows = {line.split()[1]: " ".join(line.split()[2:]) for line in made.stdout.splitlines() if not line.startswith(" ")}
    assert rows["name"] == "action details"
    assert rows["local"] == "create type process, concurrency 4"
    assert rows["local/nightly"] == "create priority 10, concurrency 1"
    assert rows["pico/pico"] == "create pool local, queue interactive, often every 6 h UTC (not active)"
    assert rows["pico/pico-nightly"] == "create pool local, queue nightly, night 0 2 * * * Europe/Berlin"
    found = deployed()
    assert sorted(found) == ["other/other", "pico/pico", "pico/pico-nightly", "run-stage/run-stage-boxes"]
    main, nightly, child = found["pico/pico"], found["pico/pico-nightly"], found["run-stage/run-stage-boxes"]
    assert main.entrypoint == "tuneline.deployed.pico"
    assert main.parameters == {"pipeline": "pico", "file": str(pico.root / "pipelines.yaml")}
    assert (main.work_pool_name, main.work_queue_name, main.description) == ("local", "interactive", "Small.")
    assert (main.global_concurrency_limit.limit, main.concurrency_options.collision_strategy.value) == (1, "ENQUEUE")
    assert {"tuneline", "pico", "mine"} < set(main.tags)
    assert main.job_variables["env"] == {"TUNELINE_DEPLOYED": __version__, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60"}
    form = main.parameter_openapi_schema["properties"]
    assert set(form) == {"overrides", "variables", "only", "force"}
    assert all(field["description"] for field in form.values())
    assert nightly.parameters["overrides"] == {"one.seed": 7}  # shown in its form
    (often,) = main.schedules
    assert (often.slug, often.active, often.schedule.interval, often.parameters) == ("often", False, datetime.timedelta(hours=6), {})
    (night,) = nightly.schedules
    assert (night.slug, night.active, night.schedule.cron, night.schedule.timezone) == ("night", True, "0 2 * * *", "Europe/Berlin")
    assert night.parameters == {"overrides": {"one.seed": 7}, "variables": {"rows": "one"}}
    assert nightly.work_queue_name == "nightly"
    assert (child.entrypoint, child.parameters, child.enforce_parameter_schema) == ("tuneline.deployed.run_stage", {}, False)
    assert "PYTHONPATH" not in child.job_variables["env"]  # its image has a tuneline of its own
    assert queues("local") == {"interactive": (1, None), "default": (2, None), "nightly": (10, 1)}
    with server() as client:
        pool = client.read_work_pool("local")
        assert (pool.type, pool.concurrency_limit) == ("process", 4)
    again = pico.tuneline("deploy")
    idle = [
        f"warning: runs in pool {pool} will wait: no worker is online: `tuneline worker {pool}` starts one" for pool in ("local", "boxes")
    ]
    assert again.stderr.splitlines() == ["nothing to change", *idle]
    assert actions(pico.json("deploy")) == dict.fromkeys(ALL, "same")
    assert deployed() == found


@pytest.mark.slow
def test_what_somebody_changed_on_the_server_is_set_right_field_by_field(pico: Project) -> None:
    from prefect.client.schemas.actions import WorkPoolUpdate

    pico.tuneline("deploy")
    nightly = deployed()["pico/pico-nightly"]
    with server() as client:
        client.request("PATCH", f"/deployments/{nightly.id}/schedules/{nightly.schedules[0].id}", json={"active": False})
        client.update_work_pool("local", WorkPoolUpdate(concurrency_limit=9))
        client.request("PATCH", "/work_pools/local/queues/nightly", json={"priority": 1})
    changed = {item["name"]: item["changes"] for item in pico.json("deploy")["items"] if item["action"] != "same"}
    assert changed == {
        "local": [{"field": "concurrency", "old": 9, "new": 4}],
        "local/interactive": [{"field": "priority", "old": 2, "new": 1}],
        "local/nightly": [{"field": "priority", "old": 1, "new": 10}],
        "pico/pico-nightly": [
            {"field": "schedules.night.active", "old": False, "new": True},
            # Prefect 3.9.1 forgets a schedule's parameters when it is switched; docs/operating/deploy.md warns of it.
            {"field": "schedules.night.parameters.overrides", "old": None, "new": {"one.seed": 7}},
            {"field": "schedules.night.parameters.variables", "old": None, "new": {"rows": "one"}},
        ],
    }
    assert deployed()["pico/pico-nightly"].id == nightly.id  # and so its runs are still its own
    assert pico.tuneline("deploy").stderr.startswith("nothing to change\n")


@pytest.mark.slow
def test_what_left_the_file_goes_and_what_is_others_stays(pico: Project) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    pico.tuneline("deploy")
    with server() as client:
        client.create_work_pool(WorkPoolCreate(name="theirs", type="process"))
        client.create_deployment(client.create_flow_from_name("theirs"), "theirs", work_pool_name="boxes", tags=["tuneline"])
        client.create_deployment(client.create_flow_from_name("theirs"), "more", work_pool_name="local", work_queue_name="their-queue")
    text = PIPELINES[: PIPELINES.index("  other:")].replace(", nightly: {priority: 10, concurrency: 1}", "")
    lines = [line for line in text.splitlines() if "night:" not in line and "boxes" not in line]
    pico.write("\n".join(lines))
    before = deployed()
    expected = {
        "pool local": "same",
        "queue local/interactive": "same",
        "deployment pico/pico": "same",
        "automation tuneline-lost": "same",
        "automation tuneline-pending": "same",
        "deployment pico/pico-nightly": "delete",
        "deployment other/other": "delete",
        "deployment run-stage/run-stage-boxes": "delete",
        "queue local/nightly": "delete",
        "pool boxes": "left",
    }
    planned = pico.json("deploy", "--dry-run")
    assert actions(planned) == expected
    assert planned["items"][-1]["note"] == "no longer in the file, but used by theirs/theirs"
    assert deployed() == before
    assert "4 deleted" in pico.tuneline("deploy").stderr
    assert sorted(deployed()) == ["pico/pico", "theirs/more", "theirs/theirs"]
    assert sorted(queues("local")) == ["default", "interactive", "their-queue"]
    pico.write(
        pico.root.joinpath("pipelines.yaml")
        .read_text()
        .replace("      often: {interval: 6h, active: false}\n", "")
        .replace("    schedules:\n", "")
    )
    (schedule,) = next(item["changes"] for item in pico.json("deploy")["items"] if item["name"] == "pico/pico")
    assert (schedule["field"], schedule["old"]["interval"], schedule["new"]) == ("schedules.often", 21600, None)
    assert deployed()["pico/pico"].schedules == []
    pico.write(
        PIPELINES[: PIPELINES.index("pools:")]
        + "pipelines:\n"
        + PIPELINES[PIPELINES.index("  here:") :].replace("other.txt", '"${rows}.txt"')
    )
    pico.tuneline("deploy")
    assert sorted(deployed()) == ["theirs/more", "theirs/theirs"]
    with server() as client:
        assert sorted(pool.name for pool in client.read_work_pools()) == ["boxes", "local", "theirs"]
        assert client.read_automations() == []
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
    pico.tuneline("deploy")
    with server() as client:
        assert [pool.name for pool in client.read_work_pools()] == ["theirs"]


def test_names_that_others_have_are_refused(pico: Project) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    with server() as client:
        client.create_work_pool(WorkPoolCreate(name="boxes", type="process"))
        client.create_deployment(client.create_flow_from_name("pico"), "pico", tags=["tuneline"])
    refused = pico.tuneline("deploy", status=2).stderr
    assert (
        "pipelines.yaml:6:17: pools.boxes.type: found docker, but the server has a pool `boxes` of type process\n\nhint: a pool keeps"
        in refused
    )
    assert (
        "pipelines.yaml:8:3: pico: found a deployment pico/pico on the server that was not made from this file\n\nhint: rename" in refused
    )
    assert sorted(deployed()) == ["pico/pico"]


@pytest.mark.slow
def test_stages_of_several_files_share_their_pools_deployment(pico: Project) -> None:
    second = PIPELINES.replace("  pico:\n", "  pico-two:\n").replace("  other:\n", "  other-two:\n")
    pico.tuneline("deploy")
    pico.write(second, "second.yaml")
    name = "deployment run-stage/run-stage-boxes"
    assert actions(pico.json("deploy", "--file", "second.yaml"))[name] == "change"
    assert actions(pico.json("deploy", "--file", "second.yaml"))[name] == "same"
    assert actions(pico.json("deploy"))[name] == "same"
    alone = PIPELINES[: PIPELINES.index("  other:")]
    pico.write(alone)
    assert actions(pico.json("deploy"))[name] == "change"
    assert "run-stage/run-stage-boxes" in deployed()
    pico.write(alone.replace("  pico:\n", "  pico-two:\n"), "second.yaml")
    assert actions(pico.json("deploy", "--file", "second.yaml"))[name] == "delete"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "0 2 * * *",
            "0 2 * * MOO",
            "pipelines.yaml:14:21: pico.schedules.night.cron: found moo for the day of the week in '0 2 * * MOO', ",
        ),
        ("  pico:", "  wait:", "pipelines.yaml:8:3: wait: found the name `wait`, which flows/pipeline.py uses itself, "),
        ("{one.seed: 7}", "{one.sed: 7}", "pipelines.yaml:14:94: pico.schedules.night.overrides.one.sed: found the unknown field `sed`"),
    ],
)
def test_what_could_not_run_is_refused(pico: Project, old: str, new: str, message: str) -> None:
    pico.write(PIPELINES.replace(old, new))
    refused = pico.tuneline("deploy", status=2)
    assert refused.stderr.startswith(message), refused.stderr
    assert deployed() == {}


def test_without_a_server_it_is_said_how_to_have_one(pico: Project) -> None:
    for command in (["deploy"], ["submit", "pico"]):
        refused = pico.tuneline(*command, status=2, PREFECT_API_URL="")
        assert refused.stderr.startswith("PREFECT_API_URL: found no ")
        assert refused.stderr.endswith("hint: `tuneline up` starts one\n")


def test_a_lost_lease_ends_no_run(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the server the lease is gone. Prefect's own code would end the run after 3 tries."""
    from prefect import flow, flow_engine
    from prefect.client.schemas.objects import StateDetails
    from prefect.concurrency import _leases
    from prefect.states import Pending

    import flows.pipeline

    monkeypatch.setattr(_leases, "_RENEWAL_RETRY_BASE_DELAY", 0.01)

    def until_it_is_given_up(maintain: Any) -> None:
        lease = uuid4()
        with maintain(lease, 300, raise_on_lease_renewal_failure=True):
            (renewal,) = [thread for thread in threading.enumerate() if str(lease) in thread.name]
            renewal.join(PATIENCE)
            assert not renewal.is_alive()

    with pytest.raises(asyncio.CancelledError):
        until_it_is_given_up(_leases.maintain_concurrency_lease)
    until_it_is_given_up(flow_engine.maintain_concurrency_lease)

    asked: list[UUID] = []
    real = flows.pipeline.maintain_concurrency_lease
    monkeypatch.setattr(flows.pipeline, "maintain_concurrency_lease", lambda lease, *a, **k: asked.append(lease) or real(lease, *a, **k))
    nothing, lease = flow(name="nothing")(lambda: None), uuid4()
    with server() as client:
        run = client.create_flow_run(nothing, state=Pending(state_details=StateDetails(deployment_concurrency_lease_id=lease)))
    flow_engine.run_flow(nothing, flow_run=run)
    assert asked == [lease], "Prefect's engine does not hold a lease by the name that flows/pipeline.py replaces"


@pytest.mark.slow
def test_a_run_of_which_nothing_is_heard_any_more_is_marked_as_crashed(pico: Project) -> None:
    """The automations of `deploy`, with windows of 10 s instead of minutes; only runs of this file are marked."""
    from prefect.events import emit_event
    from prefect.events.schemas.automations import AutomationCore
    from prefect.states import Pending, Running

    from flows.deploy.desired import crash_after, file_tag

    pico.tuneline("deploy")
    tag = file_tag(pico.root / "pipelines.yaml")
    with server() as client:
        for what, after in (("lost", "prefect.flow-run.heartbeat"), ("pending", "prefect.flow-run.Submitting")):
            item = crash_after(f"tuneline-{what}-soon", tag, {after}, 10, f"{what} in the test")  # Prefect's least
            client.create_automation(AutomationCore(name=item.name, **item.fields))
        theirs = client.create_deployment(client.create_flow_from_name("theirs"), "theirs", work_pool_name="local")
        pending, lost, foreign = (
            client.create_flow_run_from_deployment(deployment).id
            for deployment in (deployed()["pico/pico"].id, deployed()["other/other"].id, theirs)
        )
        client.set_flow_run_state(lost, Running(), force=True)
        related = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}]

        def silent() -> bool:
            """Send a last heartbeat, and another one if the server did not know its new automations yet."""
            for each in (pending, foreign):
                client.set_flow_run_state(each, Pending(name="Submitting"), force=True)
            emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{lost}"}, related=related)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not (
                crashed := all(client.read_flow_run(each).state.is_crashed() for each in (pending, lost))
            ):
                time.sleep(0.5)
            return crashed

        until(silent)
        assert client.read_flow_run(pending).state.message == "pending in the test"
        assert client.read_flow_run(lost).state.message == "lost in the test"
        assert client.read_flow_run(foreign).state.is_pending()


@pytest.mark.slow
def test_a_wrong_submit_ends_with_2_and_what_waits_is_cancelled(pico: Project) -> None:
    def refusal(*arguments: str) -> str:
        return pico.tuneline("submit", *arguments, status=2).stderr

    assert refusal("here").startswith(
        "submit here: found no such deployment on the server, expected none (none is defined)\n\nhint: `tuneline deploy` creates one"
    )
    pico.tuneline("deploy")
    known = "other/other, pico/pico, pico/pico-nightly, run-stage/run-stage-boxes"
    assert refusal("pico/picoo").startswith("submit pico/picoo: found no such deployment on the server, expected ")
    assert sorted(refusal("pico/picoo").split("expected ")[1].split("\n")[0].split(", ")) == known.split(", ")
    assert refusal("pco").startswith("pipelines.yaml: found no pipeline `pco`, expected pico, other, here")
    assert refusal("pico", "--set", "one.sed=1").startswith("--set one.sed: pico.one.sed: found the unknown field `sed`")
    assert refusal("pico", "--force", "on").startswith("--force: found no stage `on` in pico, expected one, two, gate")
    assert refusal("pico", "--queue", "nightli") == (
        "--queue: found the unknown queue `nightli` of pool `local`, expected interactive, default, nightly\n\nhint: did you mean `nightly`?\n"
    )
    with server() as client:
        client.create_deployment(client.create_flow_from_name("theirs"), "pico", work_pool_name="local")
    several = refusal("pico")
    assert several.startswith("submit pico: found 2 deployments of that name, expected one of ")
    assert {"pico/pico", "theirs/pico"} == set(several.split("one of ")[1].split("\n")[0].split(", "))
    assert pico.json("submit", "pico/pico")["state"] == "scheduled"

    # A waiting run is cancelled by the pipeline's name too; runs that a schedule plans ahead are not.
    pico.json("submit", "pico/pico")
    both = pico.tuneline("cancel", "pico", status=2).stderr
    assert both.startswith("cancel pico: found 2 runs in progress, expected one of ")
    first, second = both.partition("one of ")[2].partition("\n")[0].split(", ")
    assert pico.tuneline("cancel", first).stderr.startswith(f"cancelled {first}; ")
    assert pico.tuneline("cancel", "pico").stderr.startswith(f"cancelled {second}; ")
    assert pico.tuneline("cancel", "pico", status=2).stderr.startswith("cancel pico: found no such run")

    pico.write(PIPELINES, "second.yaml")
    assert refusal("pico/pico", "--file", "second.yaml").startswith(
        f"submit pico/pico: found pico/pico, which was deployed from {pico.root}/pipelines.yaml"
    )
