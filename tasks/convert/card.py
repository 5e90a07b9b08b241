"""Writes the model card of an export: metadata for the hub, results with intervals, data, settings, and how the model was made.

Everything in it comes from manifests, so the same artifacts give the same card. What the model is for, only its author knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tasks.convert.card_results import eval_results, evaluated, results_table
from tasks.convert.made import Made, sources
from tasks.convert.usage import usage
from tuneline.config.spec import STAGES
from tuneline.kinds.adapters import Lora
from tuneline.kinds.sft import OTHER_ADAPTERS
from tuneline.wording import markdown_table
from tuneline.workspace.artifact import Manifest
from tuneline.workspace.cards import HEAD, TAG, TO_BE_WRITTEN, license_name
from tuneline.workspace.recipe import recipe


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
        if {"size_ratio", "perplexity", "perplexity_before"} <= (figures := made.exported.metrics).keys():
            what += f" in {figures['size_ratio']:.1%} of the bytes, at a perplexity of {figures['perplexity']:.4g} instead of"
            what += f" {figures['perplexity_before']:.4g}"
    source = str(base.info.get("source", "")) if base else ""
    named = f"Its base: {source}" if source else "Its base is not recorded"
    return f"{what}, exported by tuneline. {named}; license of the base: {license_name(base_license(base)) or 'not recorded'}."


def base_license(base: Manifest | None) -> dict[str, str]:
    return (base.info.get("license") or {}) if base else {}


# --- data and settings ------------------------------------------------------------------------------------------------


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
        if manifest.type == "Adapter" and settings.keys().isdisjoint(OTHER_ADAPTERS):
            settings = settings | {"lora": Lora().model_dump(include={"r", "lora_alpha"}) | settings.get("lora", {})}
        rows += [(name, field, f"`{json.dumps(value)}`") for field, value in sorted(settings.items())]
        figures = ("loss", "eval_loss", "steps", "trained_tokens", "trainable_parameters", "all_parameters")
        rows += [(name, figure, number(manifest.metrics[figure])) for figure in figures if figure in manifest.metrics]
    note = "Settings that are not listed have tuneline's defaults."
    return markdown_table(("stage", "setting or figure", "value"), rows) + f"\n\n{note}" if rows else ""


def number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"


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
