"""A run in Prefect's UI, in a real browser: states, the graph, live progress, and the reports.

With PICTURES=docs/images it writes the pictures of docs/operating.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from pico_project import copied
from processes import PATIENCE, until
from project import ROOT, Project

from flows.run.supervisor import WATCHDOG
from flows.server.connect import free_port

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")]

PIPELINES = """\
version: 1
runtimes: {stand-in: {python: bin/python}}
pipelines:
  demo:
    description: Every way that a stage can end.
    tags: [nightly]
    parallel: 2
    stages:
      kept:   {kind: dataset, runtime: stand-in, sources: [{type: files, path: kept.txt}]}
      broken: {kind: dataset, runtime: stand-in, sources: [{type: files, path: broken.txt}], needs: [kept]}
      after:  {kind: dataset, runtime: stand-in, sources: [{type: files, path: after.txt}], needs: [broken]}
      live:   {kind: dataset, runtime: stand-in, sources: [{type: files, path: live.txt}], needs: [kept]}
      gate:   {kind: gate, require: [{metric: figure, of: live, at_least: 2}]}
"""
LOSS_CURVE = "[...document.images].some(image => image.src.startsWith('data:image/svg') && image.naturalWidth > 400)"
NEEDS = {"kept": set(), "broken": {"kept"}, "after": {"broken"}, "live": {"kept"}, "gate": {"live"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server with its UI; return its address, without `/api`."""
    home, port = tmp_path_factory.mktemp("server"), free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "true",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
    }
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(WATCHDOG), *uvicorn, "--port", str(port), "--log-level", "warning"],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        until(lambda: healthy(address), process)
        yield address
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def plain(name: str) -> str:
    """Return the stage of a task, whose name also has its figures."""
    return name.partition(": ")[0]


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/health"):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def ask(server: str, path: str, question: Any = None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(f"{server}/api/{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def newest_run(server: str, flow: str) -> dict[str, Any]:
    question = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC"}
    found: list[dict[str, Any]] = ask(server, "flow_runs/filter", question)
    return found[0]


def artifacts(server: str, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = ask(server, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    return {artifact["key"]: artifact for artifact in found if artifact["key"]}


def test_every_state_the_graph_progress_and_reports_are_there(
    project: Project, stand_in: Callable[..., None], server: str, page: Page
) -> None:
    project.write(PIPELINES)
    for name in NEEDS:
        project.write(name, f"{name}.txt")
    here = {"PREFECT_API_URL": f"{server}/api"}
    project.tuneline("run", "demo", "--only", "kept", **here)
    stand_in(broken=["data"], live=["wait"])
    secret = "hf-secret-in-the-environment"
    process = project.start("run", "demo", **here, HF_TOKEN=secret)
    try:
        until((project.root / "waiting-live").exists, process)
        run = newest_run(server, "demo")
        page.open(f"{server}/v2/runs/flow-run/{run['id']}?tab=Artifacts")
        page.until("Running", "live: step 1 of 2, half")  # while it goes on
        project.write("", "go")
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    run = newest_run(server, "demo")
    record = project.json("show", "demo")
    assert run["name"] == f"demo-{record['run_id'][-4:]}"
    assert set(run["tags"]) == {"tuneline", "demo", "nightly"}
    assert (run["state"]["name"], run["state"]["message"]) == ("Failed", "failed: broken (data)")
    tasks = {plain(task["name"]): task for task in ask(server, "task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})}
    states = {"kept": "Cached", "broken": "Failed: data", "after": "Skipped", "live": "Completed", "gate": "Refused"}
    assert {name: task["state"]["name"] for name, task in tasks.items()} == states
    assert {name: task["tags"] for name, task in tasks.items()} == {name: ["gate" if name == "gate" else "dataset"] for name in NEEDS}
    names = {task["id"]: name for name, task in tasks.items()}
    nodes = [node for _, node in ask(server, f"flow_runs/{run['id']}/graph-v2")["nodes"]]
    assert {plain(node["label"]): {names[parent["id"]] for parent in node["parents"]} for node in nodes} == NEEDS
    lines = ask(server, "logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200})
    said = [line["message"] for line in lines]
    assert said.count("data: planted data\n\nhint: none") == 1
    assert "stand-in live: wait" in said
    assert not [text for text in said if "Traceback" in text or "NoneType" in text]
    levels = {line["message"].partition(" ")[0]: line["level"] for line in lines}
    assert (levels["stand-in"], levels["its"], levels["data:"]) == (20, 30, 40)  # "its log is ..." is a warning

    page.open(f"{server}/v2/runs/flow-run/{run['id']}?tab=TaskRuns")
    page.until(run["name"], "nightly", "live: figure 1", *states, *states.values())
    assert page.colours("canvas") > 20  # the graph is drawn, not only there
    page.open(f"{server}/runs/flow-run/{run['id']}?tab=Task%20Runs")  # the older UI, one click away
    page.until(run["name"], *states, *states.values())

    shown = artifacts(server, run)
    assert set(shown) == {"run-demo", *(f"stage-demo-{name}" for name in NEEDS if name != "after")}
    assert shown["run-demo"]["description"] == "Every way that a stage can end."
    assert all(artifact["type"] == "markdown" and secret not in artifact["data"] for artifact in shown.values())
    page.open(f"{server}/v2/artifacts/artifact/{shown['run-demo']['id']}")
    page.until("demo: failed after", f"{record['run_id']}.html", "NOT met: figure of live is 1, required at least 2", "planted data")
    report = project.root / ".tuneline" / "runs" / f"{record['run_id']}.html"
    assert report.is_file()
    page.open(f"{server}/v2/artifacts/artifact/{shown['stage-demo-broken']['id']}")
    page.until("broken: failed", "planted data", "hint: none", "stand-in broken: data", "log.txt")
    page.open(f"{server}/v2/artifacts/artifact/{shown['stage-demo-kept']['id']}")
    page.until("kept: cached", record["stages"]["kept"]["key"], record["stages"]["kept"]["digest"], "figure", "/.tuneline/store/dataset/")
    page.open(f"{server}/v2/artifacts/artifact/{shown['stage-demo-gate']['id']}")
    page.until("gate: refused", "NOT met: figure of live is 1, required at least 2")


def test_a_real_run_shows_its_curve_and_its_models_side_by_side(tmp_path: Path, pico_run: Project, server: str, page: Page) -> None:
    """Its training is rebuilt, with the same bytes, and the rest is cached."""
    project = copied(pico_run, tmp_path / "project")
    project.tuneline("run", "pico", "--force", "sft", PREFECT_API_URL=f"{server}/api")
    run = newest_run(server, "pico")
    found = ask(server, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    bars = [str(artifact["description"]) for artifact in found if artifact["type"] == "progress"]
    (training,) = [text for text in bars if text.startswith("sft: ")]
    assert re.fullmatch(r"sft: step [\d,]+ of 150, loss \d\.\d+, [\d,]+ tokens/s(, about .+ left)?", training)

    shown = artifacts(server, run)
    metrics = project.json("show", "pico")["stages"]["eval-sft"]["metrics"]
    for version in ("v2/", ""):
        page.open(f"{server}/{version}artifacts/artifact/{shown['run-pico']['id']}")
        page.until("adapter sft", "quantized gptq", "words bits_per_byte", f"{metrics['dataset0/bits_per_byte']:.4g}", "met: ")
        page.until_true(LOSS_CURVE)
        page.open(f"{server}/{version}artifacts/artifact/{shown['stage-pico-words']['id']}")
        page.until("words: cached", "rows_train", "words.jsonl", "Say the word number")  # the program's own report
    page.open(f"{server}/v2/runs/flow-run/{run['id']}?tab=TaskRuns")
    page.until(run["name"], "eval", "eval-sft", "gptq", "8 Task runs")
    assert page.colours("canvas") > 20
    if folder := os.environ.get("PICTURES"):
        page.screenshot(Path(ROOT, folder, "prefect-run.png"))
        page.open(f"{server}/v2/artifacts/artifact/{shown['run-pico']['id']}")
        page.until_true(LOSS_CURVE)
        page.value("[...document.querySelectorAll('h3')].find(head => head.innerText.startsWith('Models')).scrollIntoView()")
        page.screenshot(Path(ROOT, folder, "prefect-report.png"))
