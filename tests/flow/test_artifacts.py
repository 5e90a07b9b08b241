"""The artifacts in Prefect: the text beside a progress bar, and the markdown of stages and runs."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flows.report.eta import Eta
from flows.report.markdown import LONGEST, run_report, stage_report
from tuneline.workspace.protocol import Event
from tuneline.workspace.runs import PlannedStage, RunRecord, StageRecord

PLAN = PlannedStage(stage="sft", kind="sft", names={"model": "base", "dataset": "words", "needs.0": "check"})


def test_a_training_tells_its_step_loss_speed_and_time_left() -> None:
    eta = Eta("sft")
    assert eta.latest is None
    assert not eta.take(Event(t=0, type="metric", name="loss", value=2.0))
    assert not eta.take(Event(t=0, type="progress"))
    assert eta.take(Event(t=100, type="progress", step=1000, total=3000, message="loss 2.0000"))
    assert eta.latest == (pytest.approx(100 / 3), "sft: step 1,000 of 3,000, loss 2.0000")
    assert not eta.take(Event(t=110, type="metric", name="tokens_per_second", value=2048.4))
    assert eta.take(Event(t=110, type="progress", step=1200, total=3000, message="loss 1.5000"))  # resumed at 1000: 20 steps a second
    assert eta.latest == (40.0, "sft: step 1,200 of 3,000, loss 1.5000, 2,048 tokens/s, about 1 min 30 s left")
    assert eta.take(Event(t=200, type="progress", step=3000, total=3000))
    assert eta.latest == (100.0, "sft: step 3,000 of 3,000, 2,048 tokens/s")


def test_another_phase_counts_anew_and_no_bar_goes_beyond_its_end() -> None:
    eta = Eta("words")
    eta.take(Event(t=0, type="progress", step=4, total=4, message="reading"))
    eta.take(Event(t=10, type="progress", step=0, total=100, message="counting"))
    eta.take(Event(t=20, type="progress", step=50, total=100, message="counting"))
    assert eta.latest == (50.0, "words: step 50 of 100, counting, about 10.0 s left")
    eta.take(Event(t=30, type="progress", step=101, total=100))
    assert eta.latest == (100.0, "words: step 101 of 100")


def trained(folder: Path, report: str = "") -> StageRecord:
    """Return the entry of an sft whose artifact has reports, and a warning that would break a table."""
    key, digest = "ab" * 32, "cd" * 32
    parents = {"model": "model/" + "1" * 64, "dataset": "dataset/" + "2" * 64}
    manifest = {"schema": 1, "kind": "sft", "type": "Adapter", "key": key, "document": {}, "digest": digest, "parents": parents}
    manifest |= {"files": [{"path": "a.safetensors", "size": 2048, "sha256": "0" * 64}], "metrics": {}, "info": {}, "host": {}}
    (folder / "meta").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    history = [{"step": step, "loss": 3.0 / step} for step in range(1, 9)] + [{"step": 8, "eval_loss": 0.5}]
    (folder / "meta" / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    warning = {"t": 0, "type": "warning", "message": "`a` | <img src=x>\n## no heading"}
    (folder / "meta" / "events.jsonl").write_text(json.dumps(warning) + "\n")
    (folder / "meta" / "report.md").write_text(report)
    metrics = {"loss": 0.375, "words/acc": 0.5, "words/acc_stderr": 0.0123}
    facts = {"key": key, "digest": digest, "artifact": str(folder), "seconds": 75.0, "metrics": metrics}
    return StageRecord(stage="sft", kind="sft", status="done", document={}, **facts)


def test_a_stage_says_what_it_made_from_what_and_where_it_lies(tmp_path: Path) -> None:
    text = stage_report(PLAN, trained(tmp_path / "artifact", "# Trained\n\nwell"), None)
    for line in (
        "## sft: done",
        "| time | 1 min 15 s |",
        f"| key | `sft/{'ab' * 32}` |",
        f"| digest | `{'cd' * 32}` |",
        "| payload | 1 files, 2.0 kB |",
        "| model | `base`, `model/111111111111` |",
        "| dataset | `words`, `dataset/222222222222` |",
        "| needs | `check` |",
        "| `words/acc` | 0.5 ± 0.012 |",
        "- `` `a` | <img src=x> ## no heading ``",
        "# Trained",
        str(tmp_path / "artifact"),
    ):
        assert line in text.splitlines()


def test_the_curve_is_a_picture_that_stands_in_the_text(tmp_path: Path) -> None:
    text = stage_report(PLAN, trained(tmp_path / "artifact"), None)
    (picture,) = re.findall(r"!\[loss by step\]\(data:image/svg\+xml;base64,([^)]+)\)", text)
    drawn = ElementTree.fromstring(base64.b64decode(picture))
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len((line.get("points") or "").split()) for line in lines] == [8, 1]


def test_a_failed_stage_says_its_class_hint_and_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {i}\n" for i in range(100)) + "``` and " + "x" * 1000)
    failed = StageRecord(stage="sft", kind="sft", status="failed", message="oom: no memory left\n\nhint: a smaller batch")
    text = stage_report(PLAN, failed, log)
    assert "### Failed: oom\n\n```text\nno memory left\n```\n\n**hint:** `a smaller batch`" in text
    assert "line 99" in text
    assert "line 59" not in text
    assert "````text\nline 61\n" in text, "a fence that the log cannot close"
    assert "x" * 400 not in text
    assert str(log) in text
    bug = StageRecord(stage="sft", kind="sft", status="failed", message="bug: broke\n\nhint: tell us\nTraceback:\n  here")
    assert "**hint:** `tell us`\n\n```text\nTraceback:\n  here\n```" in stage_report(PLAN, bug, None)


def test_secrets_and_length_are_kept_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-to-be-shown")
    text = stage_report(PLAN, trained(tmp_path / "artifact", "not-to-be-shown " * 20_000), None)
    assert "not-to-be-shown" not in text
    assert "*** ***" in text
    assert len(text) < 60_000
    entries = [trained(tmp_path / f"{i}").model_copy(update={"stage": f"sft{i}"}) for i in range(150)]
    record = RunRecord(run_id="r", pipeline="p", started="2026-01-01T00:00:00+00:00", state="completed", stages=entries)
    record.finished = "2026-01-01T00:01:40+00:00"
    text = run_report(record, tmp_path / "r.html")
    assert text.startswith("## p: completed after 1 min 40 s\n\nsft0 trained an adapter for 8 steps.\n\nsft1 ")
    assert "147 more were trained: sft3, " in text
    assert "\n\nRun `r` · `tuneline run p`\n" in text
    assert LONGEST / 2 < len(text) < LONGEST + 100
    assert text.endswith("Parts that are too long are only in the HTML report.\n")
    assert str(tmp_path / "r.html") in text
    assert text.count("](data:image") == text.count("=)") + len(re.findall(r"base64,[^)=]+\)", text)), "no picture is cut"
