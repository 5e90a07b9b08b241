"""The HTML report of a run, one file beside the run's record in `.tuneline/runs/`.

It is rendered from the record. Artifacts that are still in the store add curves, samples, the data report and lineage; others are
reported as gone. The file loads nothing and runs no scripts: styles and pictures are embedded, data is escaped, and its content security
policy forbids the rest.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flows.report.figures import Chart, chart, graph
from flows.report.format import duration, number, utc_time
from flows.report.headline import facts, headline, trainings, verdicts
from flows.report.line_chart import svg
from flows.report.models import columns, metric_rows, role_of, samples
from flows.report.stage import Stage, between, stages_of
from tuneline import __version__
from tuneline.config.overrides import as_flags
from tuneline.disk import human
from tuneline.files import write_atomically
from tuneline.workspace.file_names import EVENTS, HISTORY, REPORT_DATA, ROLLOUTS
from tuneline.workspace.runs import RunRecord, Runs

REWARD_CURVES = {
    "frac_reward_zero_std": "share of groups without signal",
    "completions/mean_length": "completion length",
    "entropy": "entropy",
    "kl": "divergence from the start",
    "freshness_max_logprob_diff": "largest difference of log-probabilities between engine and trainer",
}
"""Metrics of a training by rewards that get their own chart, and its title."""


def report_of(runs: Runs, record: RunRecord) -> Path:
    """Return the path of the report, and write it unless that was done after the run ended. Raises OSError if it cannot be written."""
    path = runs.folder / f"{record.run_id}.html"
    if record.finished and path.is_file() and path.stat().st_mtime_ns >= path.with_suffix(".json").stat().st_mtime_ns:
        return path  # written when the run ended: artifacts may have left the store since
    write_atomically(path, render(record).encode("utf-8", "replace"))
    return path


def render(record: RunRecord) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "size": human, "clock": utc_time, "json": as_json, "verdicts": verdicts}
    environment.filters["svg"] = lambda drawn, label: Markup(svg(drawn, label))
    stages = stages_of(record)
    compared = columns(stages)
    return environment.get_template("report.html.j2").render(
        record=record,
        version=__version__,
        command=command(record),
        seconds=between(record.started, record.finished),
        headline=headline(stages, compared),
        trained=[(stage, rows) for stage in trainings(stages) if (rows := facts(stage))],
        stages=stages,
        graph=graph({name: [other for other in stage.plan.names.values() if other in stages] for name, stage in stages.items()}),
        columns=compared,
        metrics=list(metric_rows(compared)),
        samples=list(samples(compared)),
        curves=[(stage, charts, rollouts(stage)) for stage in stages.values() if (charts := curves(stage))],
        datasets=[(stage, data_report(stage)) for stage in stages.values() if stage.kind == "dataset" and stage.metrics],
        sized=[(role_of(stage), stage) for stage in stages.values() if stage.manifest and stage.manifest.type in ("Model", "Adapter")],
        warnings=[(stage, messages) for stage in stages.values() if (messages := warnings(stage))],
    )


def command(record: RunRecord) -> str:
    words = ["tuneline", "run", record.pipeline, *as_flags(record.overrides), *(["--only", record.only] if record.only else [])]
    return shlex.join([*words, *(word for stage in record.force for word in ("--force", stage))])


def warnings(stage: Stage) -> list[str]:
    messages = (event.get("message") for event in stage.lines(EVENTS) if event.get("type") == "warning")
    return list(dict.fromkeys(str(message) for message in messages if message))


# --- training and data ------------------------------------------------------------------------------------------------


def curves(stage: Stage) -> dict[str, Chart]:
    """Return the charts of a training over its steps: rewards and their metrics, or the loss and the margin of preferences; then the
    learning rate."""
    history = [entry for entry in stage.lines(HISTORY) if isinstance(entry.get("step"), int)]
    rewards = sorted({name for entry in history for name in entry if name.startswith("rewards/") and name.endswith("/mean")})
    figures = {"reward": ["reward"]} | ({name.split("/")[1]: [name] for name in rewards} if len(rewards) > 1 else {})
    figures |= {title: [name] for name, title in REWARD_CURVES.items()}
    if not any("reward" in entry for entry in history):
        figures = {"loss": ["loss", "eval_loss"], "reward margin": ["rewards/margins", "eval_rewards/margins"]}
    figures["learning rate"] = ["learning_rate"]
    drawn = {}
    for title, names in figures.items():
        lines = {name: [(float(entry["step"]), float(entry[name])) for entry in history if _is_number(entry.get(name))] for name in names}
        if lines[names[0]]:
            span = (min(entry["step"] for entry in history), max(entry["step"] for entry in history))
            drawn[title] = chart(lines, span, log=title == "loss")
    return drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def rollouts(stage: Stage) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return completions of a grpo training at its first and its last step: the best and the worst of each."""
    kept = [line for line in stage.lines(ROLLOUTS) if _is_number(line.get("reward")) and _is_number(line.get("step"))]
    if not kept:
        return []
    ends = dict.fromkeys([min(line["step"] for line in kept), max(line["step"] for line in kept)])
    shown = []
    for step in ends:
        ranked = sorted((line for line in kept if line["step"] == step), key=lambda line: -line["reward"])
        shown.append((f"step {step}", ranked[:1] + ranked[1:][-1:]))
    return shown


def data_report(stage: Stage) -> dict[str, Any]:
    """Return meta/report.json of a Dataset with its totals; empty if the artifact is gone."""
    try:
        found = json.loads(stage.text(REPORT_DATA))
    except ValueError:
        return {}
    fates = sorted({fate for source in found["sources"] for fate in source["fates"]})
    highest = max((rows for _, _, rows in found["lengths"]), default=0)
    return {**found, "fates": fates, "highest": highest}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
