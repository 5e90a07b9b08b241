"""Writes the section `Use` of a model card: code that loads what was exported, with no library of ours."""

from __future__ import annotations

from dataclasses import dataclass

from tuneline.kinds.export import ExportStage


@dataclass(frozen=True)
class Adapter:
    """What an adapter needs. `base`: a repository on the hub, a folder in the export, or None if the base was left out."""

    base: str | None
    revision: str | None
    """Commit of a repository."""
    vocabulary: int
    """Number of tokens of the base with those that the adapter adds; 0 if it adds none."""


def usage(stage: ExportStage, adapter: Adapter | None, own_code: bool, quantized: bool = False) -> str:
    """Return markdown. `own_code`: whether the model brings Python files."""
    place = stage.push or "."
    options = [f'revision="{stage.revision}"'] if stage.push and stage.revision != "main" else []
    trusted = ["trust_remote_code=True"] if own_code else []
    where = ", ".join([f'"{place}"', *options])
    names = "AutoModelForCausalLM, AutoTokenizer" + (", GenerationConfig" if adapter else "")
    lines = [f"from transformers import {names}", "", f"tokenizer = AutoTokenizer.from_pretrained({', '.join([where, *trusted])})"]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        pinned = [f'revision="{adapter.revision}"'] if adapter.revision else []
        base = ", ".join([f'"{adapter.base or "BASE"}"', *pinned, *trusted])
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({base})" + ("" if adapter.base else "  # your folder of the base"))
        if adapter.vocabulary:
            lines.append(f"base.resize_token_embeddings({adapter.vocabulary}, mean_resizing=False)  # room for the tokens that were added")
        lines.append(f"model = PeftModel.from_pretrained(base, {where})")
        lines.append(f"model.generation_config = GenerationConfig.from_pretrained({where})  # ends where trained answers end")
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({', '.join([where, *trusted])})")
    if quantized:
        lines.insert(0, "# pip install transformers optimum gptqmodel")
    return ("" if stage.push else "In this folder:\n\n") + "```python\n" + "\n".join(lines) + "\n```"
