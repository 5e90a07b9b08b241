"""The first lines of a report: what was trained on which data, whether the model became better, and what the gates decided."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flows.report.format import number
from flows.report.models import LOWER_IS_BETTER, RIGHT, Cell, Column, metric_rows, role_of
from flows.report.stage import Stage
from tuneline.config.spec import STAGES
from tuneline.kinds.training import Training
from tuneline.workspace.file_names import HISTORY

SHOWN = 3  # trainings that get a sentence
SETTINGS = 12  # settings shown of a training; the lineage has all
ENDED = {"failed": "failed", "skipped": "was skipped", "cancelled": "was cancelled", "killed": "was killed", "not run": "did not run"}
GATES = {"done": "passed", "refused": "refused", "failed": "could not judge", "skipped": "was not reached", "not run": "was not reached"}


def trainings(stages: Mapping[str, Stage]) -> list[Stage]:
    return [stage for stage in stages.values() if issubclass(STAGES.get(stage.kind, object), Training)]


def headline(stages: Mapping[str, Stage], compared: list[Column]) -> list[str]:
    """Return the sentences of the headline."""
    trained = trainings(stages)
    lines = [" ".join(_of_training(stage, stages, compared)) for stage in trained[:SHOWN]]
    done = {stage.name for stage in trained if stage.status in ("done", "cached")}
    if len(trained) > SHOWN:
        lines.append(f"{len(trained) - SHOWN} more were trained: {', '.join(stage.name for stage in trained[SHOWN:])}.")
    if not done:  # only the models from before a training can be compared
        lines += [f"{column.model} was evaluated: {text}." for column in compared[:SHOWN] if (text := _scored(column, compared))]
    gates = {stage.name: GATES[stage.status] for stage in stages.values() if stage.kind == "gate" and stage.status in GATES}
    return lines + [f"{'The gate' if len(gates) == 1 else f'Gate {name}'} {verdict}." for name, verdict in gates.items()]


def _of_training(stage: Stage, stages: Mapping[str, Stage], compared: list[Column]) -> Iterator[str]:
    names = stage.plan.names
    of_data = [name for field, name in names.items() if field.partition(".")[0] in ("dataset", "datasets")]
    on = [_with_rows(stages[name]) for name in of_data if name in stages]
    what = "the whole model" if role_of(stage) == "fine-tuned" else "an adapter"
    what = f"{names['adapter']} further, {what}" if "adapter" in names else what
    of, data = f" of {names['model']}" if "model" in names else "", f" on {', '.join(on)}" if on else ""
    if stage.status not in ("done", "cached"):
        yield f"{stage.name}, {what}{of}{data}, {ENDED.get(stage.status, f'is {stage.status}')}."
        return
    steps = max((entry["step"] for entry in stage.lines(HISTORY) if isinstance(entry.get("step"), int)), default=0)
    yield f"{stage.name} trained {what}{of}{data}{f' for {steps:,} steps' if steps else ''}."
    tested = next((column for column in compared if stage.name in (column.model, *_made_of(column.model, stages))), None)
    if tested and (text := _scored(tested, compared)):
        yield f"{'' if tested.model == stage.name else f'As {tested.model}, '}{text}."


def _with_rows(data: Stage) -> str:
    rows = data.metrics.get("rows_train")
    return f"{data.name} ({rows:,.0f} rows)" if rows else data.name


def _made_of(model: str, stages: Mapping[str, Stage]) -> Iterator[str]:
    """Yield the models that the model was made from, nearest first."""
    while model in stages and (names := stages[model].plan.names):
        model = names.get("adapters.0") or names.get("model", "")
        yield model


def _scored(tested: Column, compared: list[Column]) -> str:
    """Return the most important figure, compared with the base model's."""
    index = compared.index(tested)
    cells = {f"{metric} of {of}" if of else metric: (metric, row[index]) for of, metric, row in metric_rows(compared) if row[index]}
    ranked = sorted(cells, key=lambda name: _rank(cells[name][0]))
    if not ranked:
        return ""
    metric, cell = cells[ranked[0]]
    assert cell is not None
    return f"{ranked[0]} is {cell.figure}{_against(metric, cell)}"


def _rank(metric: str) -> int:
    known = (*RIGHT, *sorted(LOWER_IS_BETTER))
    name = metric.partition(",")[0]
    return known.index(name) if name in known else len(known)


def _against(metric: str, cell: Cell) -> str:
    if cell.difference is None:
        return ""
    beyond = {"better": "better than chance explains", "worse": "worse than chance explains"}.get(cell.verdict, "which chance may explain")
    if not cell.difference:
        beyond = "no difference"
    elif cell.error is None:  # without standard errors, chance cannot be estimated
        beyond = ""
    return f", where the base has {number(cell.value - cell.difference)} ({cell.difference:+.3g}{beyond and f', {beyond}'})"


# --- beside the sentences ---------------------------------------------------------------------------------------------


def facts(stage: Stage) -> list[tuple[str, str]]:
    """Return the settings of a training that differ from the defaults, and what it ran on."""
    host, info = (stage.manifest.host, stage.manifest.info) if stage.manifest else ({}, {})
    settings = list(_settings({name: value for name, value in stage.document.get("config", {}).items() if name not in ("kind", "dtype")}))
    more = f" and {len(settings) - SETTINGS} more" if len(settings) > SETTINGS else ""
    machine = f"{host['cores']} cores, {host['machine']}" if host.get("cores") else ""
    found = [
        ("settings", f"{', '.join(settings[:SETTINGS])}{more}" or ("the defaults" if stage.document else "")),
        ("precision", info.get("dtype", "").removeprefix("torch.")),
        ("computed on", f"{info['devices']} x {info['device']}, {machine}" if "device" in info else machine),
        ("speed", f"{info['tokens_per_second']:,.0f} tokens/s" if info.get("tokens_per_second") else ""),
        ("peak memory", ", ".join(_memory(info))),
        *info.get("trackers", {}).items(),
    ]
    return [(name, value) for name, value in found if value]


def _memory(info: Mapping[str, Any]) -> Iterator[str]:
    for name, of in (("peak_device_memory", " per device"), ("peak_memory", "")):
        if info.get(name):
            yield f"{info[name] / 1e9:.2f} GB{of}"


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {value if isinstance(value, str | int | float) else json.dumps(value)}"


def verdicts(stage: Stage) -> list[tuple[str, str, str]]:
    """Return (`met`, `NOT met` or `note`; the figure; the requirement) of each line that a gate wrote."""
    rows = []
    for line in stage.message.splitlines():
        said, _, text = line.partition(": ")
        if said not in ("met", "NOT met", "note"):
            rows.append(("", line, ""))
            continue
        figure, _, required = text.partition(", required ") if said != "note" else (text, "", "")
        rows.append((said, figure, required))
    return rows
