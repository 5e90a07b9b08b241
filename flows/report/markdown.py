"""The reports of a stage and of a run as markdown artifacts for Prefect's UI.

Both versions of the UI render tables and embedded pictures (data:image/svg+xml), and remove scripts, styles and mermaid or show
them as text. So curves are SVG pictures. Data is quoted as code, secrets are masked.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from flows.report.figures import Chart
from flows.report.format import duration
from flows.report.headline import headline
from flows.report.html import command, curves, warnings
from flows.report.line_chart import svg
from flows.report.models import Cell, columns, metric_rows
from flows.report.stage import Stage, between, stages_of
from flows.report.tables import figures
from tuneline.disk import human
from tuneline.secrets import masked
from tuneline.wording import markdown_table
from tuneline.workspace.file_names import REPORT_TEXT
from tuneline.workspace.runs import PlannedStage, RunRecord, StageRecord

LONGEST = 200_000  # characters of an artifact; Prefect keeps every version of it in its database
LONGEST_REPORT = 50_000  # characters of the report by the stage's program
LOG_TAIL, LONGEST_LINE = 40, 400  # lines of a failed stage's log, characters of a line


def stage_report(plan: PlannedStage, entry: StageRecord, log: Path | None) -> str:
    """Return the report of a stage. `log`: the log file of a failed stage."""
    return _joined(_stage_parts(Stage(plan, entry, entry.status), log))


def _stage_parts(stage: Stage, log: Path | None) -> Iterator[str]:
    yield f"## {stage.name}: {stage.status}"
    yield markdown_table(["kind", _code(stage.kind)], _facts(stage))
    if stage.entry and stage.entry.artifact:
        yield f"Its artifact{f' ({stage.gone})' if stage.gone else ''}:\n\n{_fenced(stage.entry.artifact)}"
    if stage.kind == "gate":
        yield _verdicts(stage)
    elif stage.status == "failed":
        yield from _failure(stage, log)
    yield from _figures(stage)
    for name, drawn in curves(stage).items():
        yield _picture(stage, name, drawn)
    if messages := warnings(stage):
        yield "### Warnings\n\n" + "\n".join(f"- {_code(message)}" for message in messages)
    if report := stage.text(REPORT_TEXT):
        yield f"### Report of {_code(stage.kind)}\n\n{_cut(report, LONGEST_REPORT)}"


def _facts(stage: Stage) -> Iterator[list[str]]:
    if stage.seconds:
        yield ["time", f"{duration(stage.seconds)}{' when it was built' if stage.status == 'cached' else ''}"]
    if stage.attempts:
        yield ["attempts", stage.attempts]
    if stage.entry and stage.entry.key:
        yield ["key", _code(f"{stage.kind}/{stage.entry.key}")]
        yield ["digest", _code(stage.entry.digest or "")]
    if stage.manifest:
        yield ["payload", f"{len(stage.manifest.files)} files, {human(stage.manifest.size)}"]
        for tracker, link in stage.manifest.info.get("trackers", {}).items():
            yield [tracker, link if link.startswith(("http://", "https://")) else _code(link)]
    for field, other in stage.plan.names.items():
        yield [field.partition(".")[0], _made_from(stage, field, other)]
    for field, commit in stage.document.get("commits", {}).items():
        yield [field, f"commit {_code(commit)}"]


def _made_from(stage: Stage, field: str, other: str) -> str:
    parent = stage.manifest.parents.get(field, "") if stage.manifest else ""
    kind, _, key = parent.partition("/")
    return f"{_code(other)}, {_code(f'{kind}/{key[:12]}')}" if parent else _code(other)


def _failure(stage: Stage, log: Path | None) -> Iterator[str]:
    failure_class, _, rest = stage.message.partition(": ")
    message, _, rest = rest.partition("\n\nhint: ")
    hint, _, details = rest.partition("\n")
    yield f"### Failed: {failure_class}\n\n{_fenced(_cut(message, LONGEST_REPORT))}"
    if hint:
        yield f"**hint:** {_code(hint)}"
    if details:
        yield _fenced(_cut(details, LONGEST_REPORT))
    if log and log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        tail = "\n".join(_cut(line, LONGEST_LINE) for line in lines)
        yield f"### The end of its log\n\n{_fenced(tail)}\n\nThe whole log:\n\n{_fenced(str(log))}"


def _figures(stage: Stage) -> Iterator[str]:
    names = [name for name in stage.metrics if not name.endswith("_stderr")]
    if names:
        cells = [(name, Cell(stage.metrics[name], stage.metrics.get(f"{name}_stderr"))) for name in names]
        yield "### Figures\n\n" + markdown_table(["figure", "value"], ([_code(name), cell.figure] for name, cell in cells), right=True)


# --- a run --------------------------------------------------------------------------------------------------------------


def run_report(record: RunRecord, report: Path) -> str:
    """Return the report of a run. `report`: the path of its HTML report."""
    return _joined(_run_parts(record, report))


def _run_parts(record: RunRecord, report: Path) -> Iterator[str]:
    stages = stages_of(record)
    compared = columns(stages)
    yield f"## {record.pipeline}: {record.state} after {duration(between(record.started, record.finished))}"
    if sentences := headline(stages, compared):
        yield "\n\n".join(map(_escaped, sentences))
    yield f"Run {_code(record.run_id)} · {_code(command(record))}"
    rows = ([stage.name, stage.kind, _status(stage), _time(stage), _first(stage)] for stage in stages.values())
    yield markdown_table(["stage", "kind", "status", "time", "figures"], rows)
    for stage in stages.values():
        if stage.kind == "gate" and stage.message:
            yield f"### {stage.name}: {stage.status}\n\n{_verdicts(stage)}"
        elif stage.status == "failed":
            yield f"### {stage.name}: failed\n\n{_fenced(stage.message)}"
    if compared:
        heads = [f"{column.role} {_code(column.model)}" for column in compared]
        rows = ([f"{of} {metric}", *(_compared(cell) for cell in cells)] for of, metric, cells in metric_rows(compared))
        yield "### Models side by side\n\n" + markdown_table(["", *heads], rows, right=True)
        yield "**Bold**: the best of its row. ±: one standard error. In brackets: the difference from the base model."
    for stage in stages.values():
        if drawn := curves(stage):
            first = next(iter(drawn))  # the loss, or the reward
            yield _picture(stage, first, drawn[first])
    if kept := [entry for entry in record.stages if entry.artifact]:
        rows = ([entry.stage, *map(_code, _lineage(stages[entry.stage], entry))] for entry in kept)
        yield "### Lineage\n\n" + markdown_table(["stage", "key", "digest", "made from"], rows)
        width = max(len(entry.stage) for entry in kept)
        yield "Folders of the artifacts:\n\n" + _fenced("\n".join(f"{entry.stage:<{width}}  {entry.artifact}" for entry in kept))
    more = _code(f"tuneline show {record.pipeline} --run {record.run_id} --open")
    yield f"With answers and more pictures, {more}:\n\n{_fenced(str(report))}"


def _status(stage: Stage) -> str:
    return f"**{stage.status}**" if stage.status in ("failed", "refused") else stage.status


def _time(stage: Stage) -> str:
    return duration(stage.seconds).replace(" ", "\N{NO-BREAK SPACE}") if stage.seconds and stage.status != "cached" else ""


def _first(stage: Stage) -> str:
    if stage.status in ("failed", "skipped", "cancelled", "killed"):
        return _code(stage.message.partition("\n")[0])
    return figures(stage.entry) if stage.entry else ""


def _lineage(stage: Stage, entry: StageRecord) -> list[str]:
    parents = dict.fromkeys(stage.plan.names.values())
    return [f"{entry.kind}/{(entry.key or '')[:12]}", (entry.digest or "")[:12], ", ".join(parents)]


def _compared(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    figure = f"**{cell.figure}**" if cell.best else cell.figure
    if not cell.difference:
        return figure
    return f"{figure} ({cell.difference:+.3g}{', ' + cell.verdict if cell.verdict else ''})"


def _verdicts(stage: Stage) -> str:
    return "\n".join(f"- {_code(line)}" for line in stage.message.splitlines())


# --- pictures -------------------------------------------------------------------------------------------------------------


def _picture(stage: Stage, name: str, drawn: Chart) -> str:
    legend = " (blue: train, orange: validation)" if "eval_loss" in drawn.lines else ""
    picture = base64.b64encode(svg(drawn, f"{name} of {stage.name}").encode()).decode()
    return f"### {name} of {stage.name} by step{legend}\n\n![{name} by step](data:image/svg+xml;base64,{picture})"


# --- markdown -------------------------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    """Escape text for markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)


def _code(text: str) -> str:
    """Return text as inline code, on one line."""
    if not (text := " ".join(text.split())):
        return ""
    if "`" not in text:
        return f"`{text}`"
    ticks = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{ticks} {text} {ticks}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"


def _joined(parts: Iterable[str]) -> str:
    """Join the parts that fit into an artifact. Leaves out too long parts as a whole, because half a picture is useless."""
    text, left_out = "", ""
    for part in parts:
        if len(text) + len(part) <= LONGEST:
            text += f"{part}\n\n"
        else:
            left_out = "Parts that are too long are only in the HTML report.\n"
    return masked((text + left_out).encode("utf-8", "replace")).decode("utf-8", "replace")
