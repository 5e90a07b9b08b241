"""What Prefect's UI shows of a run, looked at with a real browser: states, the graph, live progress, and the reports.

With PICTURES=docs/images it takes those of docs/operating.md anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from project import ROOT, Project, python_of

from flows.server import free_port
from flows.supervisor import WATCHDOG

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
PICO = """\
version: 1
roots: ["%(models)s"]
runtimes: {here: {python: "%(python)s"}, apart: {python: "%(quantize)s"}}
pipelines:
  words:
    description: A pico model learns which word belongs to which number.
    tags: [nightly]
    stages:
      base:      {kind: model, path: %(model)s, runtime: here}
      corpus:    {kind: dataset, model: base, sources: [{type: files, path: words.jsonl}], split: {validation: 0.1, test: 0.2}, runtime: here}
      sft:       {kind: sft, model: base, dataset: corpus, lora: {r: 8}, learning_rate: 5e-3, max_steps: 150, global_batch_size: 4, runtime: here}
      merged:    {kind: merge, adapters: [sft], runtime: here}
      gptq:      {kind: quantize, model: merged, calibration: corpus, group_size: 32, samples: 8, max_perplexity_ratio: 3, runtime: apart}
      eval-base: {kind: evaluate, model: base, datasets: [corpus], max_new_tokens: 4, runtime: here}
      eval-sft:  {kind: evaluate, model: sft, datasets: [corpus], max_new_tokens: 4, runtime: here}
      eval-gptq: {kind: evaluate, model: gptq, datasets: [corpus], max_new_tokens: 4, runtime: here}
      gate:      {kind: gate, require: [{metric: corpus/bits_per_byte, of: eval-gptq, at_most: 100}]}
"""
LOSS_CURVE = "[...document.images].some(image => image.src.startsWith('data:image/svg') && image.naturalWidth > 400)"
NEEDS = {"kept": set(), "broken": {"kept"}, "after": {"broken"}, "live": {"kept"}, "gate": {"live"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with its UI; its address, without `/api`."""
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
        deadline = time.monotonic() + 180
        while not healthy(address):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


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
        while not (project.root / "waiting-live").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        run = newest_run(server, "demo")
        page.open(f"{server}/v2/runs/flow-run/{run['id']}?tab=Artifacts")
        page.until("Running", "live: step 1 of 2, half")  # while it goes on
        project.write("", "go")
        process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    run = newest_run(server, "demo")
    record = project.json("show", "demo")
    assert run["name"] == f"demo-{record['run_id'][-4:]}"
    assert set(run["tags"]) == {"tuneline", "demo", "nightly"}
    assert (run["state"]["name"], run["state"]["message"]) == ("Failed", "failed: broken (data)")
    tasks = {task["name"]: task for task in ask(server, "task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})}
    states = {"kept": "Cached", "broken": "Failed: data", "after": "Skipped", "live": "Completed", "gate": "Refused"}
    assert {name: task["state"]["name"] for name, task in tasks.items()} == states
    assert {name: task["tags"] for name, task in tasks.items()} == {name: ["gate" if name == "gate" else "dataset"] for name in NEEDS}
    names = {task["id"]: name for name, task in tasks.items()}
    nodes = [node for _, node in ask(server, f"flow_runs/{run['id']}/graph-v2")["nodes"]]
    assert {node["label"]: {names[parent["id"]] for parent in node["parents"]} for node in nodes} == NEEDS
    lines = ask(server, "logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200})
    said = [line["message"] for line in lines]
    assert said.count("data: planted data\n\nhint: none") == 1
    assert "stand-in live: wait" in said
    assert not [text for text in said if "Traceback" in text or "NoneType" in text]
    levels = {line["message"].partition(" ")[0]: line["level"] for line in lines}
    assert (levels["stand-in"], levels["its"], levels["data:"]) == (20, 30, 40)  # "its log is ..." is a warning

    page.open(f"{server}/v2/runs/flow-run/{run['id']}?tab=TaskRuns")
    page.until(run["name"], "nightly", *states, *states.values())
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


def test_a_real_run_shows_its_curve_and_its_models_side_by_side(
    project: Project, runtime_python: Path, pico_model: Path, server: str, page: Page
) -> None:
    project.write(PICO % {"python": runtime_python, "quantize": python_of("quantize"), "model": pico_model, "models": pico_model.parent})
    rows = [{"prompt": f"Say the word number {i}.", "completion": f"word{i % 7}"} for i in range(60)]
    project.write("".join(json.dumps(row) + "\n" for row in rows), "words.jsonl")
    project.tuneline("run", "words", PREFECT_API_URL=f"{server}/api")
    run = newest_run(server, "words")
    found = ask(server, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    bars = [str(artifact["description"]) for artifact in found if artifact["type"] == "progress"]
    (training,) = [text for text in bars if text.startswith("sft: ")]
    assert re.fullmatch(r"sft: step [\d,]+ of 150, loss \d\.\d+, [\d,]+ tokens/s(, about .+ left)?", training)

    shown = artifacts(server, run)
    metrics = project.json("show", "words")["stages"]["eval-sft"]["metrics"]
    for version in ("v2/", ""):
        page.open(f"{server}/{version}artifacts/artifact/{shown['run-words']['id']}")
        page.until(
            "base base", "adapter sft", "quantized gptq", "corpus bits_per_byte", f"{metrics['dataset0/bits_per_byte']:.4g}", "met: "
        )
        page.until_true(LOSS_CURVE)
        page.open(f"{server}/{version}artifacts/artifact/{shown['stage-words-corpus']['id']}")
        page.until("corpus: done", "rows_train", "words.jsonl", "Say the word number")  # the program's own report
    page.open(f"{server}/v2/runs/flow-run/{run['id']}?tab=TaskRuns")
    page.until(run["name"], *(f"eval-{name}" for name in ("base", "sft", "gptq")), "9 Task runs")
    assert page.colours("canvas") > 20
    if folder := os.environ.get("PICTURES"):
        page.screenshot(Path(ROOT, folder, "prefect-run.png"))
        page.open(f"{server}/v2/artifacts/artifact/{shown['run-words']['id']}")
        page.until_true(LOSS_CURVE)
        page.value("[...document.querySelectorAll('h3')].find(head => head.innerText.startsWith('Models')).scrollIntoView()")
        page.screenshot(Path(ROOT, folder, "prefect-report.png"))
