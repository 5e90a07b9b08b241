"""Compare the models of a run: the metrics of their evaluations, and their answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.report.format import number, with_error
from flows.report.stage import Stage
from tuneline.config.spec import STAGES
from tuneline.workspace.file_names import SAMPLES

ROLES = ("base", "adapter", "fine-tuned", "merged", "quantized")  # order of columns; others come last
LOWER_IS_BETTER = {"bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "brier_score", "ter"}
RIGHT = ("score", "exact_match", "acc", "acc_norm", "pass@1")  # the first of these scores that a sample has marks it right or wrong
CERTAIN = 1.96  # standard errors of a difference for a confidence of 95%
SHOWN_SAMPLES = 6  # samples shown of each dataset or benchmark
LONGEST_ANSWER = 1200  # characters


def role_of(stage: Stage) -> str:
    if stage.manifest and stage.manifest.type == "Adapter":
        return "adapter"
    return STAGES[stage.kind].role if stage.kind in STAGES else ""


@dataclass
class Column:
    """A model with its evaluations."""

    model: str
    role: str
    root: str
    """The base model that it was made from."""
    evaluations: list[Stage] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def columns(stages: Mapping[str, Stage]) -> list[Column]:
    """Return the evaluated models, base models first. Evaluations of a model share a column unless they have the same metric."""
    found: list[Column] = []
    for stage in stages.values():
        model = stage.plan.names.get("model", "")
        if stage.kind == "evaluate" and stage.metrics and model in stages:
            known = (column for column in found if column.model == model and not column.metrics.keys() & stage.metrics.keys())
            column = next(known, None)
            if column is None:
                found.append(column := Column(model, role_of(stages[model]), _root(stages, model)))
            column.evaluations.append(stage)
            column.metrics |= stage.metrics
    return sorted(found, key=lambda column: ROLES.index(column.role) if column.role in ROLES else len(ROLES))


def _root(stages: Mapping[str, Stage], model: str) -> str:
    """Return the stage of kind `model` that a model was made from."""
    names = stages[model].plan.names
    while (made_from := names.get("model") or names.get("adapters.0", "")) in stages:
        model, names = made_from, stages[made_from].plan.names
    return model


@dataclass
class Cell:
    value: float
    error: float | None
    best: bool = False
    difference: float | None = None
    """From the base model."""
    verdict: str = ""
    """`better` or `worse` if the difference is significant (see CERTAIN)."""

    @property
    def figure(self) -> str:
        return with_error(number(self.value), self.error)


def metric_rows(compared: list[Column]) -> Iterator[tuple[str, str, list[Cell | None]]]:
    """Yield (dataset or benchmark, metric, a cell for each column)."""
    names = dict.fromkeys(name for column in compared for name in column.metrics if not name.endswith("_stderr"))
    for name in sorted(names, key=lambda name: name.partition("/")[0]):
        of, _, metric = name.rpartition("/")
        sign = -1 if metric.partition("@")[0] in LOWER_IS_BETTER else 1
        cells = [
            Cell(column.metrics[name], column.metrics.get(f"{name}_stderr")) if name in column.metrics else None for column in compared
        ]
        values = [cell.value for cell in cells if cell]
        best, differ = max(values, key=lambda value: sign * value), len(set(map(number, values))) > 1
        for column, cell in zip(compared, cells, strict=True):
            if cell is None:
                continue
            cell.best = differ and number(cell.value) == number(best)
            pairs = zip(compared, cells, strict=True)
            base = next((other for that, other in pairs if that.role == "base" and that.model == column.root), None)
            if base and column.role != "base":
                cell.difference = cell.value - base.value
                spread = CERTAIN * math.hypot(cell.error or 0.0, base.error or 0.0)
                known = bool(spread) or None not in (cell.error, base.error)  # an error of 0 is known, too: all rows are alike
                if known and abs(cell.difference) > spread:
                    cell.verdict = "better" if sign * cell.difference > 0 else "worse"
        yield of, metric, cells


@dataclass
class Sample:
    """A question with its answers as (models, answer, mark). Models with the same answer are grouped."""

    prompt: str
    reference: str
    answers: list[tuple[list[str], str, str]]
    change: int
    """1: became right, -1: became wrong, 0: neither, from the first model to the second."""


def samples(compared: list[Column]) -> Iterator[tuple[str, list[str], list[Sample], list[Sample]]]:
    """Yield for each dataset or benchmark: (name, models, all samples that every model answered, those to show)."""
    by_question: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for column in compared:
        for stage in column.evaluations:
            for line in stage.lines(SAMPLES):
                of = str(line.get("of", ""))
                of = stage.plan.names.get(of.replace("dataset", "datasets."), of)
                by_question.setdefault(of, {}).setdefault(str(line.get("id")), {}).setdefault(column.model, line)
    for of, questions in by_question.items():
        models = list(dict.fromkeys(model for lines in questions.values() for model in lines))
        found = [_sample(lines, models) for lines in questions.values() if len(lines) == len(models)]
        kinds = [[sample for sample in found if sample.change == change] for change in (1, -1, 0)]
        turns = sorted((i, kind, sample.prompt) for kind, of_kind in enumerate(kinds) for i, sample in enumerate(of_kind[:SHOWN_SAMPLES]))
        yield of, models, found, [kinds[kind][i] for i, kind, _ in turns[:SHOWN_SAMPLES]]


def _sample(lines: Mapping[str, dict[str, Any]], models: list[str]) -> Sample:
    first = lines[models[0]]
    marks = {model: _mark(lines[model].get("scores", {})) for model in models}
    answers: dict[tuple[str, str], list[str]] = {}
    for model in models:
        answers.setdefault((str(lines[model].get("answer", ""))[:LONGEST_ANSWER], marks[model]), []).append(model)
    change = 0
    if len(models) > 1:
        before, after = marks[models[0]], marks[models[1]]
        change = (after == "right") - (before == "right") if {before, after} <= {"right", "wrong"} else 0
    grouped = [(who, answer, mark) for (answer, mark), who in answers.items()]
    return Sample(str(first.get("prompt", "")), str(first.get("reference", ""))[:LONGEST_ANSWER], grouped, change)


def _mark(scores: Mapping[str, Any]) -> str:
    """Return `right`, `wrong`, or a figure."""
    value = next((float(scores[name]) for name in RIGHT if isinstance(scores.get(name), int | float)), None)
    if value is None:
        return f"{scores['bits'] / scores['bytes']:.3g} bits per byte" if scores.get("bytes") else ""
    return "right" if value == 1 else "wrong" if value == 0 else f"{value:.3g}"
