"""The report of a run: its content compared with the artifacts, what it must not load, and its look in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, Project
from report_page import Page

from flows.report.figures import Graph, chart, graph, log_numbers, round_numbers
from flows.report.headline import headline
from flows.report.html import render, report_of
from flows.report.models import columns
from flows.report.stage import stages_of
from tuneline.canonical import key_of
from tuneline.config.load import load
from tuneline.workspace.artifact import Artifact, Manifest
from tuneline.workspace.runs import RunRecord, Runs, StageRecord, planned
from tuneline.workspace.store import Store

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>document.title = 'owned'</script><img src=\"ADDRESS/img.png\" onerror=\"document.title='owned'\">"


class Story:
    """A finished run of the shipped pipeline `demo`, with files as the programs write them; no program runs."""

    def __init__(self, root: Path):
        self.store, self.runs = Store(root / "store"), Runs(root / "runs")
        self.record = self.runs.begin("demo", ("sft.lora.r=8", "--var data=a b.jsonl"))
        self.record.planned = planned(load(ROOT / "pipelines.yaml").pipeline("demo"), None)
        self.artifacts: dict[str, Artifact] = {}

    def stage(self, name: str, type: str, metrics: dict[str, float], meta: dict[str, str], status: str = "done", size: int = 10) -> None:
        plan = next(plan for plan in self.record.planned if plan.stage == name)
        inputs = {field: {"digest": self.artifacts[other].digest} for field, other in plan.names.items()}
        document = {"schema": 1, "kind": plan.kind, "program": 1, "config": {"stage": name}, "inputs": inputs, "commits": {}, "salt": ""}
        document |= {"files": {"sources.0.path": [{"suffix": ".jsonl", "sha256": "ab" * 32}]}, "libraries": {"torch": "2.13.0"}}
        key = key_of(document)
        built = self.store.staging_dir(key)
        for folder, files in (("payload", {"weights": name + "x" * (size - len(name))}), ("meta", meta)):
            (built / folder).mkdir()
            for file, text in files.items():
                (built / folder / file).write_text(text, encoding="utf-8")
        began = datetime.now(UTC)
        host = {"started": began.isoformat(), "finished": (began + timedelta(seconds=90)).isoformat(), "cores": 2, "machine": "x86_64"}
        info = {"tokens_per_second": 1234.4, "peak_memory": 1_500_000_000} if type == "Adapter" else {}

        def manifest(digest: str, files: Any) -> Manifest:
            return Manifest(
                kind=plan.kind, type=type, key=key, document=document, digest=digest, files=files, parents={}, metrics=metrics, info=info, host=host
            )  # fmt: skip

        artifact = self.artifacts[name] = self.store.publish(built, manifest)
        shown = {metric.replace("dataset0", "bookings"): value for metric, value in metrics.items()}
        seconds = 12.5 if status == "done" else 0.0
        self.record.stages.append(
            StageRecord(
                stage=name, kind=plan.kind, status=status, key=key, digest=artifact.digest, document=document,
                artifact=str(artifact.path), seconds=seconds, metrics=shown,
            )
        )  # fmt: skip

    def evaluation(self, name: str, right: list[bool], bits: float) -> None:
        """Four rows. The mean's error is that of 0s and 1s; see tasks/scoring/scores.py."""
        mean = sum(right) / 4
        error = (mean * (1 - mean) / 3) ** 0.5
        metrics = {"dataset0/exact_match": mean, "dataset0/exact_match_stderr": error}
        metrics |= {"dataset0/bits_per_byte": bits, "dataset0/bits_per_byte_stderr": 0.1}
        samples = [
            {
                "of": "dataset0",
                "id": str(i),
                "prompt": f"question {i}\u2028",  # an end of a line to Python, not to JSON
                "answer": "yes" if hit else HOSTILE,
                "reference": "yes",
                "scores": {"exact_match": float(hit)},
            }
            for i, hit in enumerate(right)
        ]
        self.stage(
            name,
            "Report",
            metrics,
            {"samples.jsonl": "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples) + '{"of": "cut off'},
        )


@pytest.fixture
def story(tmp_path: Path) -> Story:
    story = Story(tmp_path)
    history = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-3 / step} for step in range(1, 41)] + [
        {"step": 40, "eval_loss": 0.07}
    ]
    source = {
        "source": f"a {HOSTILE}.jsonl",
        "read": 12,
        "fates": {"duplicates": 2, "over_long": 1},
        "splits": {"train": 4, "validation": 1, "test": 4},
    }
    data = {"sources": [source], "lengths": [[0, 9, 3], [10, 19, 6]], "ignored": {"colour": 3}}
    story.stage("base", "Model", {"parameters": 1000.0, "bytes": 5000.0}, {}, "cached", 5000)
    story.stage("bookings", "Dataset", {"rows_train": 4.0, "rows_test": 4.0}, {"report.json": json.dumps(data)})
    story.stage("sft", "Adapter", {"loss": 0.05}, {"history.jsonl": "".join(json.dumps(entry) + "\n" for entry in history)}, size=300)
    story.evaluation("eval-base", [False, False, False, True], 2.0)
    story.evaluation("eval-sft", [True, True, True, False], 1.0)
    story.stage(
        "merged",
        "Model",
        {"max_logit_difference": 1e-5},
        {"events.jsonl": '{"t": 1, "type": "warning", "message": "a <b>bold</b> warning"}\n'},
    )
    return story


def page_of(record: RunRecord) -> Page:
    page = Page(render(record))
    assert page.self_contained(), page.active
    return page


# --- content --------------------------------------------------------------------------------------------------------------


def test_every_figure_is_that_of_its_manifest(story: Story) -> None:
    page = page_of(story.record)
    for name, artifact in story.artifacts.items():
        for metric, value in artifact.manifest.metrics.items():
            assert page.figures[name, metric.replace("dataset0", "bookings")] == value
        assert artifact.digest in page.text
        assert artifact.key in page.text
    compared = {key: value for key, value in page.figures.items() if key[0] in ("base", "sft") and key[1].startswith("bookings/")}
    assert compared == {
        ("base", "bookings/exact_match"): 0.25, ("sft", "bookings/exact_match"): 0.75,
        ("base", "bookings/bits_per_byte"): 2.0, ("sft", "bookings/bits_per_byte"): 1.0,
    }  # fmt: skip
    assert page.nodes == {
        "base: model, cached", "bookings: dataset, done", "sft: sft, done", "eval-base: evaluate, done", "eval-sft: evaluate, done",
        "merged: merge, done", "gptq: quantize, pending", "eval-gptq: evaluate, pending", "gate: gate, pending",
    }  # fmt: skip
    said = " ".join(page.text.split())
    assert "tuneline run demo --set sft.lora.r=8 --var 'data=a b.jsonl'" in said
    assert "cached, saved 1 min 30 s" in said
    assert "From base to sft: 3 of 4 answers became right, 1 became wrong. 4 of 4 shown." in said
    assert "sha256 " + "ab" * 32 in said
    assert "torch 2.13.0" in said
    assert "adapter sft 300 bytes" in said
    assert "base base 5.0 kB" in said
    assert "merged a <b>bold</b> warning" in said
    assert "0–9 3 10–19 6" in said  # the histogram
    assert render(story.record).count('<svg class="chart"') == 2  # loss and learning rate, as in Prefect's UI
    assert "loss by step, logarithmic · ━ train · ━● validation" in said
    assert re.search(r"source read duplicates over long train validation test a <script>.*jsonl 12 2 1 4 1 4", said)


def test_a_model_that_was_trained_whole_is_no_adapter(story: Story) -> None:
    manifest = Path(story.record.stages[2].artifact or "", "manifest.json")
    manifest.write_text(manifest.read_text().replace('"Adapter"', '"Model"'))
    assert "fine-tuned sft 300 bytes" in " ".join(page_of(story.record).text.split())


def test_what_is_better_and_whether_chance_could_have_done_it(story: Story) -> None:
    html = re.sub(r"\s+", " ", render(story.record))
    exact, bits = (re.search(rf'data-metric="bookings/{name}" data-model="sft".*?</td>', html) for name in ("exact_match", "bits_per_byte"))
    assert exact is not None
    assert bits is not None
    assert 'class="best">0.75 <' in exact[0]
    assert 'muted">+0.5<' in exact[0]  # 0.25 ± 0.25 against 0.75 ± 0.25: four rows prove nothing
    assert 'class="best">1 <' in bits[0]  # fewer bits are better
    assert 'better">-1<' in bits[0]  # 2 ± 0.1 against 1 ± 0.1


def test_all_right_against_all_wrong_is_no_chance(story: Story) -> None:
    story.record.stages = [stage for stage in story.record.stages if stage.kind != "evaluate"]
    story.evaluation("eval-base", [False] * 4, 2.0)
    story.evaluation("eval-sft", [True] * 4, 1.0)
    assert "where the base has 0 (+1, better than chance explains)" in " ".join(page_of(story.record).text.split())


def test_data_cannot_act_in_the_page(story: Story) -> None:
    html = render(story.record)
    assert html.count("&lt;script&gt;") >= 2  # the hostile answers, the hostile file name
    assert "<img" not in html
    assert HOSTILE in Page(html).text


def test_what_left_the_store_is_said_and_the_record_is_enough(story: Story) -> None:
    before = page_of(story.record).figures
    shutil.rmtree(story.store.root)
    page = page_of(story.record)
    assert page.text.count("its artifact is no longer in the store") >= len(story.artifacts)
    assert page.figures == before
    assert "question" not in page.text
    assert story.artifacts["sft"].digest in page.text


def test_an_artifact_that_was_built_again_is_not_taken_for_the_runs_own(story: Story) -> None:
    story.record.stages[3].digest = "0" * 64
    page = page_of(story.record)
    assert "its artifact was built again since, with another digest" in page.text
    assert "3 of 4 answers became right" not in page.text  # those of another evaluation


def test_damaged_meta_costs_its_part_only(story: Story) -> None:
    for name, file in (("bookings", "report.json"), ("sft", "history.jsonl"), ("merged", "events.jsonl"), ("eval-sft", "samples.jsonl")):
        (story.artifacts[name].path / "meta" / file).write_bytes(b'\xff\x00{"step": "x"}\n[1, 2]\n{"of": 3}\n')
    page = page_of(story.record)
    assert page.figures["sft", "bookings/exact_match"] == 0.75
    assert "Training of" not in page.text


def test_a_report_stays_as_the_run_left_it_and_can_be_made_anew(story: Story) -> None:
    path = report_of(story.runs, story.record)
    assert "running" in path.read_text()
    story.runs.finish(story.record, "completed")
    kept = report_of(story.runs, story.record).read_text()
    assert "running" not in Page(kept).text
    assert "question 1" in kept
    shutil.rmtree(story.store.root)
    assert report_of(story.runs, story.record).read_text() == kept
    path.unlink()
    assert "question 1" not in report_of(story.runs, story.record).read_text()


def test_a_killed_run_shows_what_it_came_to(story: Story) -> None:
    """As `tuneline show` reads it: no process was left to write the report or the end of the run."""
    page = page_of(story.record.model_copy(update={"state": "killed"}))
    assert page.text.split()[:2] == ["demo", "killed"]
    assert "gate: gate, not run" in page.nodes
    assert page.figures["sft", "bookings/exact_match"] == 0.75


def test_the_first_sentences_say_what_was_trained_and_whether_it_is_better(story: Story) -> None:
    record = story.record.model_copy(deep=True)
    gate = next(plan for plan in record.planned if plan.kind == "gate")
    record.stages.append(
        StageRecord(stage=gate.stage, kind="gate", status="done", message="met: exact_match of eval-sft is 0.75, required at least 0.5")
    )
    said = " ".join(page_of(record).text.split())
    assert said.index("sft trained an adapter of base on bookings (4 rows) for 40 steps.") < said.index("Stages")
    assert "bookings/exact_match" not in said[: said.index("Stages")]
    assert "exact_match of bookings is 0.75 ± 0.25, where the base has 0.25 (+0.5, which chance may explain). The gate passed." in said
    assert "settings stage sft" in said
    assert "computed on 2 cores, x86_64 speed 1,234 tokens/s peak memory 1.50 GB" in said
    assert "met exact_match of eval-sft is 0.75 at least 0.5" in said


def test_the_first_sentences_of_what_was_not_trained(story: Story) -> None:
    assert headline(stages_of(story.record.model_copy(update={"planned": [], "stages": story.record.stages[:1]})), []) == []
    stages = stages_of(story.record)
    stages["sft"].entry.status = "failed"  # type: ignore[union-attr]
    assert headline(stages, columns(stages))[0] == "sft, an adapter of base on bookings (4 rows), failed."
    del stages["sft"]
    assert headline(stages, columns(stages))[0] == "base was evaluated: exact_match of bookings is 0.25 ± 0.25."


# --- layout ---------------------------------------------------------------------------------------------------------------


def clear(drawn: Graph) -> None:
    for i, one in enumerate(drawn.nodes):
        assert one.x >= 0
        assert one.x + one.width <= drawn.width
        assert 0 <= one.y <= drawn.height - 46
        for other in drawn.nodes[i + 1 :]:
            assert one.x + one.width < other.x or other.x + other.width < one.x or abs(one.y - other.y) > 46, (one, other)


def test_stages_lie_in_layers_and_none_covers_another() -> None:
    needs = {"base": [], "data": ["base"]} | {f"sft-{i}": ["base", "data"] for i in range(8)}
    needs |= {f"eval-{i}": [f"sft-{i}", "data"] for i in range(8)} | {
        "gate": [f"eval-{i}" for i in range(8)] + ["data"],
        "x" * 63: ["gate"],
    }
    drawn = graph(needs)
    clear(drawn)
    place = {node.name: node for node in drawn.nodes}
    assert list(place) == list(needs)
    assert all(place[other].x + place[other].width < place[name].x for name, others in needs.items() for other in others)
    assert len(drawn.edges) == 1 + 8 + 8 + 8 + 1  # those that others imply are left out
    assert place["x" * 63].label == "x" * 25 + "…"
    assert len({node.y for node in drawn.nodes if node.name.startswith("eval-")}) == 8
    rows = [[place[f"{kind}-{i}"].y for i in range(8)] for kind in ("sft", "eval")]
    assert rows[0] == rows[1]  # lines that need not cross do not


def test_an_edge_past_other_columns_keeps_clear_of_their_stages() -> None:
    drawn = graph({"a": [], "b": ["a"], "side": ["a"], "c": ["b"], "end": ["c", "side"]})
    clear(drawn)
    c = next(node for node in drawn.nodes if node.name == "c")
    passing = next(path for path in drawn.edges if f"H{c.x + c.width:.1f}" in path)
    height = float(re.findall(r" ([\d.]+)H", passing)[0])
    assert not c.y <= height <= c.y + 46


def test_a_long_chain_is_laid_out_at_once() -> None:
    names = [f"s{i}" for i in range(1000)]
    began = time.process_time()
    drawn = graph({name: names[max(0, i - 3) : i] for i, name in enumerate(names)})
    assert time.process_time() - began < 20  # 0.1 here; each further edge twice the time would take years
    assert len(drawn.nodes) == 1000
    assert len(drawn.edges) == 999
    assert graph({}).nodes == []


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [(0, 1, [0, 0.5, 1]), (0.013, 1.94, [0, 0.5, 1, 1.5, 2]), (3, 3, [1, 2, 3, 4, 5]), (0, 0, None), (-2e-5, 4e-5, [-2e-5, 0, 2e-5, 4e-5])],
)  # fmt: skip
def test_round_numbers(low: float, high: float, numbers: list[float] | None) -> None:
    found = round_numbers(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 9
    if numbers:
        assert found == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("low", "high", "numbers"), [(0.05, 2, [0.05, 0.1, 0.2, 0.5, 1, 2]), (0.003, 7, [0.001, 0.01, 0.1, 1, 10]), (1, 10, [1, 2, 5, 10])]
)
def test_numbers_of_a_logarithmic_axis(low: float, high: float, numbers: list[float]) -> None:
    assert log_numbers(low, high) == numbers


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis() -> None:
    falling = chart({"loss": [(0.0, 4.0), (1.0, 0.4), (2.0, 0.04)]}, (0, 2), 400, 100, log=True)
    drops = [after - before for (_, before), (_, after) in pairwise(falling.lines["loss"])]
    assert drops[0] == pytest.approx(drops[1], abs=0.2)  # ten times less is as far down wherever it is
    assert falling.log
    for points in ([(0.0, 4.0), (1.0, 2.0)], [(0.0, 4.0), (1.0, 0.0)], [(0.0, 1.0), (1.0, -1.0)]):
        assert not chart({"loss": points}, (0, 1), log=True).log


def test_a_line_lies_in_its_box_and_long_ones_are_thinned() -> None:
    drawn = chart({"loss": [(float(i), 5 / (i + 1)) for i in range(100_000)], "eval_loss": [(99_999.0, 0.5)]}, (0, 99_999), 400, 100)
    points = drawn.lines["loss"]
    assert len(points) <= 602
    assert (points[0], points[-1]) == ((0.0, 16.7), (400.0, 100.0))  # 5 of 0 to 6, which the round numbers span
    assert all(0 <= x <= 400 and 0 <= y <= 100 for x, y in points)
    assert drawn.lines["eval_loss"] == [(400.0, 91.7)]
    assert chart({"loss": [(7.0, 1.0)]}, (7, 7)).lines["loss"] == [(0.0, 95.0)]


# --- runs -----------------------------------------------------------------------------------------------------------------


def test_a_failed_run_shows_why(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    stand_in(one=["data"])
    record, _ = run()
    page = page_of(record)
    assert "one failed data: planted data hint: none" in " ".join(page.text.split())
    assert page.nodes == {
        "one: dataset, failed",
        "two: dataset, skipped",
        "other: dataset, done",
        "gate: gate, skipped",
        "after: dataset, skipped",
    }


def test_a_refused_run_shows_the_figures_it_was_refused_for(demo: Project, stand_in: Callable[..., None], run: Callable[..., Any]) -> None:
    stand_in(two=[0.25])
    record, states = run(only="gate", force=["one"])
    assert record.state == "refused"
    assert (states["gate"], states["flow"]) == ("Refused", "Refused")
    page = page_of(record)
    assert "gate refused figure required NOT met figure of two is 0.25 at least 0.5" in " ".join(page.text.split())
    assert "The gate refused." in page.text
    assert page.nodes == {"one: dataset, done", "two: dataset, done", "gate: gate, refused"}
    assert page.figures["two", "figure"] == 0.25
    assert "tuneline run demo --only gate --force one" in page.text


@pytest.mark.slow
def test_run_and_show_name_the_report_and_open_it(demo: Project, stand_in: Callable[..., None], prefect_server: str) -> None:
    stand_in(one=["config"])
    failed = demo.tuneline("run", "demo", status=1)
    path = Path(failed.stderr.splitlines()[-1].removeprefix("report: "))
    assert "planted config" in Page(path.read_text()).text
    assert demo.tuneline("run", "demo").stderr.splitlines()[-1].startswith("report: ")
    cached = demo.tuneline("run", "demo", "--only", "two")
    newest = Path(cached.stderr.splitlines()[-1].removeprefix("report: "))
    assert Page(newest.read_text()).nodes == {"one: dataset, cached", "two: dataset, cached"}

    opener = demo.write(f"#!{sys.executable}\nimport sys\nopen('opened', 'w').write(sys.argv[1])\n", "opener")
    opener.chmod(0o755)
    demo.tuneline("show", "demo", "--open", BROWSER=f"{opener} %s")
    assert (demo.root / "opened").read_text() == newest.as_uri()
    shown = demo.tuneline("show", "demo", "--run", path.stem, "--open", BROWSER="", PATH="/nowhere", DISPLAY="")
    assert f"report: {path}\n" in shown.stderr
    path.unlink()
    assert "planted config" in shown.stdout
    demo.tuneline("show", "demo", "--run", path.stem)
    assert "planted config" in Page(path.read_text()).text


def test_a_folder_that_cannot_be_written_costs_only_the_report(demo: Project, run: Callable[..., Any]) -> None:
    record, _ = run()
    (demo.root / ".tuneline" / "runs" / f"{record.run_id}.html").unlink()
    (demo.root / ".tuneline" / "runs" / f"{record.run_id}.html").mkdir()
    shown = demo.tuneline("show", "demo")
    assert "warning: the report cannot be written: " in shown.stderr
    assert "completed" in shown.stderr


# --- in a browser ---------------------------------------------------------------------------------------------------------


class Listener(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *arguments: Any) -> None: ...


@pytest.fixture
def listener() -> Iterator[str]:
    """Return the address of a server that records its requests."""
    Listener.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def in_browser(html: str, folder: Path, *flags: str) -> str:
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}",
        *flags,
    )
    command = [str(BROWSER), *flags, "--virtual-time-budget=2000", (folder / "page.html").as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)}).stdout


MEASURE = """<!doctype html><title></title><iframe srcdoc="{page}" style="width: {width}px; height: 900px; border: 0"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, cut = []
  page.querySelectorAll("details").forEach(each => each.open = true)
  for (const each of page.querySelectorAll("body *:not(svg *)"))
    if (each.getBoundingClientRect().right > {width} + 1 && !each.closest("pre")) cut.push(each.tagName + "." + each.className + "#" + each.id)
  document.title = "cut off: " + [...new Set(cut)].join(" ")
}}
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off_on_a_desk_or_a_phone(story: Story, tmp_path: Path, width: int) -> None:
    gate = next(plan for plan in story.record.planned if plan.kind == "gate")
    lines = "met: bookings/exact_match of eval-sft is 0.75, required at least 0.5\nNOT met: bookings/bits_per_byte of eval-sft is 1, required at most 0.5"
    story.record.stages.append(StageRecord(stage=gate.stage, kind="gate", status="refused", message=lines))
    story.stage("gptq", "Model", {"perplexity": 3.0}, {}, size=200)
    story.evaluation("eval-gptq", [True] * 4, 1.0)
    html = render(story.record)
    dumped = in_browser(MEASURE.format(page=escape(html), width=width), tmp_path, "--dump-dom", f"--window-size={width + 40},1000")
    assert re.findall(r"<title>(.*?)</title>", dumped)[0].strip() == "cut off:"
    if folder := os.environ.get("REPORT_SCREENSHOTS"):  # for people who change the page
        in_browser(html, tmp_path, f"--screenshot={Path(folder).absolute() / f'report-{width}.png'}", f"--window-size={width},3600")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_in_chromium_nothing_is_asked_for_and_the_figures_are_there(
    story: Story, listener: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dump(html: str) -> str:
        return in_browser(html, tmp_path, "--dump-dom")

    hostile = HOSTILE.replace("ADDRESS", listener)
    monkeypatch.setattr(f"{__name__}.HOSTILE", hostile)
    story.stage("gptq", "Model", {"perplexity": 3.0}, {}, size=200)
    story.evaluation("eval-gptq", [False] * 4, 1.0)
    html = render(story.record)
    dumped = dump(html)
    seen = Page(dumped)
    assert Listener.asked == []
    assert "<title>owned</title>" not in dumped
    assert hostile in seen.text
    assert seen.figures == Page(html).figures
    assert seen.figures["gptq", "bookings/exact_match"] == 0.0
    assert "<title>owned</title>" in dump(f"<title>mine</title>{hostile}")  # so the listener would have heard
    assert Listener.asked[0] == "/img.png"
