"""Writes the model card of an export: metadata for the hub, results with intervals, data, settings, and how the model was made.

Everything in it comes from manifests, so the same artifacts give the same card. What the model is for, only its author knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.convert.usage import Adapter, usage
from tuneline.config.spec import STAGES
from tuneline.kinds.adapters import Lora
from tuneline.kinds.export import ExportStage
from tuneline.kinds.stage import ProgramStage
from tuneline.wording import markdown_table
from tuneline.workspace.artifact import Manifest
from tuneline.workspace.cards import HEAD, TAG, TO_BE_WRITTEN, license_name
from tuneline.workspace.recipe import recipe

CERTAIN = 1.96  # standard errors on each side of a value, for a confidence of 95%


@dataclass(frozen=True)
class Made:
    """What was exported, and how it was made: manifests and names of stages by `kind/key`."""

    stage: ExportStage
    manifests: dict[str, Manifest]
    names: dict[str, str]
    adapter: Adapter | None
    """None for a model."""
    own_code: bool
    """Whether the model brings Python files."""
    merged: float | None
    """Maximum difference of logits of a merge while exporting."""

    @property
    def exported(self) -> Manifest:
        return next(manifest for artifact, manifest in self.manifests.items() if self.names[artifact] == self.stage.of)

    def of_kind(self, *kinds: str) -> Iterator[tuple[str, Manifest]]:
        yield from ((self.names[artifact], manifest) for artifact, manifest in self.manifests.items() if manifest.kind in kinds)

    def trained(self) -> Iterator[tuple[str, Manifest]]:
        yield from self.of_kind(*(kind for kind, stage in STAGES.items() if issubclass(stage, ProgramStage) and stage.trains))

    @property
    def quantized(self) -> bool:
        return STAGES[self.exported.kind].quantized

    def base(self) -> Manifest | None:
        """Return the manifest of the model where the chain of models begins; None if it is no longer in the store."""
        found: Manifest | None = self.exported
        while found is not None and found.kind != "model":
            found = self.manifests.get(found.parents.get("model") or found.parents.get("adapters.0", ""))
        return found


def model_card(made: Made) -> str:
    """Return the card as markdown with metadata."""
    from huggingface_hub import ModelCardData

    stage = made.stage
    base = made.base()
    hub = base.document["config"].get("hub") if base else None
    title = (stage.push or stage.of).rpartition("/")[2]
    results = list(evaluated(made))
    license = {"license": stage.license} if stage.license else base_license(base)
    data = ModelCardData(
        base_model=hub,
        base_model_relation=relation(made) if hub else None,
        datasets=sorted({source["repo"] for _, each in made.of_kind("dataset") for source in sources(each) if "repo" in source}) or None,
        eval_results=list(eval_results(made, results)) or None,
        library_name="peft" if made.adapter else "transformers",
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        model_name=title,
        pipeline_tag="text-generation",
        tags=[TAG],
    )
    parts = [f"# {title}", summary(made, base), "## Use", usage(stage, made.adapter, made.own_code, made.quantized), HEAD, TO_BE_WRITTEN]
    sections = {"Data": data_table(made), "Training": settings_table(made), "Results": results_table(made, results)}
    parts += [part for head, text in sections.items() if text for part in (f"## {head}", text)]
    parts += ["## How it was made", chain_table(made), "The pipeline as it ran; files are named by their sha256:"]
    parts += [f"```yaml\n{recipe(made.names, made.manifests).rstrip()}\n```", versions(made)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def relation(made: Made) -> str:
    if made.adapter:
        return "adapter"
    return "quantized" if made.quantized else "finetune"


def summary(made: Made, base: Manifest | None) -> str:
    what = "An adapter (PEFT)" if made.adapter else "A model"
    if made.stage.merge:
        what = "A model, merged from an adapter and its base"
    if made.quantized:
        what = f"A model, quantized to {setting(made.exported, 'bits')} bits ({setting(made.exported, 'method').upper()})"
    source = str(base.info.get("source", "")) if base else ""
    named = f"Its base: {source}" if source else "Its base is not recorded"
    return f"{what}, exported by tuneline. {named}; license of the base: {license_name(base_license(base)) or 'not recorded'}."


def base_license(base: Manifest | None) -> dict[str, str]:
    return (base.info.get("license") or {}) if base else {}


# --- data and settings ------------------------------------------------------------------------------------------------


def sources(dataset: Manifest) -> list[dict[str, Any]]:
    return list(dataset.document["config"]["sources"])


def data_table(made: Made) -> str:
    """Return datasets, and the stages that read them: some only measure."""
    rows = []
    for artifact, dataset in made.manifests.items():
        if dataset.kind != "dataset":
            continue
        readers = ", ".join(made.names[other] for other, each in made.manifests.items() if artifact in each.parents.values())
        counts = [f"{dataset.metrics[f'rows_{split}']:,.0f}" for split in ("train", "validation", "test")]
        of = ", ".join(source_text(dataset, index, source) for index, source in enumerate(sources(dataset)))
        rows.append((made.names[artifact], of, *counts, readers))
    return markdown_table(("dataset", "sources", "train rows", "validation rows", "test rows", "read by"), rows) if rows else ""


def source_text(dataset: Manifest, index: int, source: Mapping[str, Any]) -> str:
    named = source.get("repo") or source.get("task") or ("source code" if source["type"] == "code" else "local files")
    commit = dataset.document["commits"].get(f"sources.{index}.repo")
    allowed = ", ".join(source.get("licenses", ()))
    license = license_name(dataset.info.get("licenses", {}).get(f"sources.{index}")) or (f"only {allowed}" if allowed else "not recorded")
    return f"{named}{f' at {commit[:12]}' if commit else ''} (license: {license})"


def setting(manifest: Manifest, field: str) -> Any:
    """Return the value of a field with a default, which manifests leave out."""
    return manifest.document["config"].get(field, STAGES[manifest.kind].model_fields[field].default)


def settings_table(made: Made) -> str:
    """Return the settings of each training that differ from defaults, with rank and scale of a LoRA, and its figures."""
    rows = []
    for name, manifest in made.trained():
        settings = manifest.document["config"]
        if manifest.type == "Adapter" and not settings.keys() & {"vera", "oft", "ia3"}:
            settings = settings | {"lora": Lora().model_dump(include={"r", "lora_alpha"}) | settings.get("lora", {})}
        rows += [(name, field, f"`{json.dumps(value)}`") for field, value in sorted(settings.items())]
        figures = ("loss", "eval_loss", "steps", "trained_tokens", "trainable_parameters", "all_parameters")
        rows += [(name, figure, number(manifest.metrics[figure])) for figure in figures if figure in manifest.metrics]
    note = "Settings that are not listed have tuneline's defaults."
    return markdown_table(("stage", "setting or figure", "value"), rows) + f"\n\n{note}" if rows else ""


def number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"


# --- results ----------------------------------------------------------------------------------------------------------


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
        margin = CERTAIN * result.error if result.error is not None else None
        interval = [round(result.value - margin, 6), round(result.value + margin, 6)] if margin is not None else None
        facts = {"confidence_interval_95": interval, "rows": result.rows}
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


# --- how it was made --------------------------------------------------------------------------------------------------


def chain_table(made: Made) -> str:
    rows = [
        (made.names[artifact], each.kind, f"`{each.digest[:16]}`", f"`{each.key[:16]}`", f"{each.document.get('program', '')}")
        for artifact, each in made.manifests.items()
    ]
    return markdown_table(("stage", "kind", "digest of its files", "cache key", "program version"), rows)


def versions(made: Made) -> str:
    found = {f"{name} {version}" for each in made.manifests.values() for name, version in each.document.get("libraries", {}).items()}
    return f"Libraries: {', '.join(sorted(found))}." if found else ""
