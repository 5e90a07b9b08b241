"""`tuneline init`: write a pipelines.yaml that runs unchanged, with comments on what to change first."""

from __future__ import annotations

import json
from pathlib import Path

from flows.folders import home_of
from tuneline.config.json_schema import json_schema
from tuneline.errors import ConfigError, Problem

STARTER = """\
# yaml-language-server: $schema=.tuneline/schema.json
version: 1

pipelines:
  first:
    description: Train a small model on sums; change the model and the data to yours.
    stages:
      # To use a model on this machine: {kind: model, path: FOLDER}, or {kind: model, gguf: FILE}.
      base:      {kind: model, hub: HuggingFaceTB/SmolLM2-135M-Instruct}
      # To use your own rows: {type: files, path: data/*.jsonl}, one {"messages": [...]} per line.
      data:      {kind: dataset, model: base, sources: [{type: reasoning_gym, task: chain_sum, size: 600}], split: {test: 0.2}}
      sft:       {kind: sft, model: base, dataset: data, lora: {r: 16, lora_alpha: 32}, learning_rate: 1e-3,
                  max_steps: 40, global_batch_size: 8}
      eval-base: {kind: evaluate, model: base, datasets: [data], max_new_tokens: 32}
      eval-sft:  {kind: evaluate, model: sft, datasets: [data], max_new_tokens: 32}
      merged:    {kind: merge, adapters: [sft]}
      gate:      {kind: gate, require: [{metric: data/exact_match, of: eval-sft, improves_on: eval-base}]}
"""


def write_starter(folder: Path) -> list[Path]:
    """Write pipelines.yaml, its schema and a .gitignore; return the files. Raises ConfigError if there is a pipelines.yaml already."""
    file, schema, ignore = folder / "pipelines.yaml", home_of(folder) / "schema.json", folder / ".gitignore"
    if file.exists():
        raise ConfigError(
            [Problem("", "found a pipelines.yaml here already, expected a folder without one", "nothing was changed", place=str(file))]
        )
    schema.parent.mkdir(exist_ok=True)
    schema.write_text(json.dumps(json_schema(), indent=1, ensure_ascii=False), encoding="utf-8")
    file.write_text(STARTER, encoding="utf-8")
    written = [file, schema]
    if not ignore.exists():
        ignore.write_text(".tuneline/\n", encoding="utf-8")
        written.append(ignore)
    return written
