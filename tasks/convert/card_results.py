"""Writes the results of a model card: evaluations of the exported model and of those beside it, with intervals of 95%."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.convert.made import Made, sources
from tuneline.wording import markdown_table

CERTAIN = 1.96  # standard errors on each side of a value, for a confidence of 95%


@dataclass(frozen=True)
class Metric:
    """A value of an evaluation. `model`: the evaluated stage; `subject`: dataset or benchmark."""

    model: str
    subject: str
    figure: str
    value: float
    error: float | None
    rows: int | None
    source: str
    """The dataset's repository on the hub, or the subject."""

    def interval(self) -> list[float] | None:
        """Return the bounds for a confidence of 95%; those of a share of answers are from 0 to 1."""
        if self.error is None:
            return None
        most = 1.0 if self.value <= 1 and self.figure != "bits_per_byte" else math.inf
        low, high = (self.value + side * CERTAIN * self.error for side in (-1, 1))
        return [round(max(low, 0.0), 6), round(min(high, most), 6)]

    def shown(self) -> str:
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {CERTAIN * self.error:.2g}")


def evaluated(made: Made) -> Iterator[Metric]:
    for name, report in made.of_kind("evaluate"):
        if name not in made.stage.evaluations:
            continue
        datasets = {f"dataset{slot.rpartition('.')[2]}": p for slot, p in report.parents.items() if slot.startswith("datasets.")}
        for metric, value in sorted(report.metrics.items()):
            subject, _, figure = metric.partition("/")
            if figure.endswith("_stderr"):
                continue
            repositories = [source.get("repo") for source in sources(made.manifests[datasets[subject]])] if subject in datasets else []
            shown = made.names[datasets[subject]] if subject in datasets else subject
            known = repositories[0] if len(repositories) == 1 and repositories[0] else shown
            error = report.metrics.get(f"{metric}_stderr") or None  # equal scores of all rows tell no error, as in `tuneline show`
            rows = report.info.get("rows", {}).get(subject)
            yield Metric(made.names[report.parents["model"]], shown, figure, value, error, rows, known)


def eval_results(made: Made, results: list[Metric]) -> Iterator[Any]:
    """Yield the hub's results of the exported model."""
    from huggingface_hub import EvalResult

    for result in results:
        if result.model != made.stage.of:
            continue
        facts = {"confidence_interval_95": result.interval(), "rows": result.rows}
        yield EvalResult(
            task_type="text-generation",
            dataset_type=result.source,
            dataset_name=result.subject,
            dataset_split="test",
            metric_type=result.figure,
            metric_value=round(result.value, 6),
            metric_name=result.figure,
            metric_args={name: value for name, value in facts.items() if value is not None} or None,
        )


def results_table(made: Made, results: list[Metric]) -> str:
    """Return metrics by model, the exported one first, and the number of rows; numbers if the models were asked different ones.
    Intervals are 95%."""
    of, models = made.stage.of, sorted({result.model for result in results}, key=lambda model: (model != made.stage.of, model))
    if not models:
        return ""
    found: dict[tuple[str, str], dict[str, Metric]] = {}
    for result in results:
        found.setdefault((result.subject, result.figure), {})[result.model] = result
    lines = []
    for (subject, figure), each in found.items():
        asked = dict.fromkeys(str(each[model].rows or "?") for model in models if model in each)
        values = (each[model].shown() if model in each else "" for model in models)
        lines.append((f"{subject}/{figure}", *values, ", ".join(asked)))
    notes = ["Intervals are for a confidence of 95%. Datasets are scored on their test splits, which no training saw."]
    if of not in models:
        notes.append(f"`{of}` itself was not evaluated.")
    elif made.merged is not None:
        notes.append(f"Measured before the merge, whose logits differ by at most {made.merged:.2g}.")
    elif made.stage.dtype != "auto":
        notes.append(f"Measured before the weights were cast to {made.stage.dtype}.")
    return markdown_table(("metric", *models, "rows"), lines, right=True) + "\n\n" + " ".join(notes)
