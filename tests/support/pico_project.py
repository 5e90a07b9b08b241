"""A pipeline with every real stage on a pico model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from project import Project, python_of

PIPELINES = """\
version: 1
roots: ["%(models)s"]
runtimes: {here: {python: "%(python)s"}, apart: {python: "%(quantize)s"}}
pipelines:
  pico:
    track: {tensorboard: {}}
    stages:
      base:     {kind: model, path: %(model)s, runtime: here}
      words:    {kind: dataset, model: base, sources: [{type: files, path: words.jsonl}], split: {validation: 0.1, test: 0.2}, runtime: here}
      sft:      {kind: sft, model: base, dataset: words, lora: {r: 8, lora_dropout: 0.1}, learning_rate: 5e-3, max_steps: 150,
                 global_batch_size: 4, runtime: here, resources: {checkpoint_steps: 5}}
      merged:   {kind: merge, adapters: [sft], runtime: here}
      gptq:     {kind: quantize, model: merged, calibration: words, group_size: 32, samples: 8, max_perplexity_ratio: 3, runtime: apart}
      eval:     {kind: evaluate, model: gptq, datasets: [words], max_new_tokens: 4, runtime: here}
      eval-sft: {kind: evaluate, model: sft, datasets: [words], max_new_tokens: 4, runtime: here}
      gate:     {kind: gate, require: [{metric: words/bits_per_byte, of: eval, at_most: 100}]}
"""


def make(root: Path, python: Path, model: Path, pipelines: str = PIPELINES, quantize: Path | None = None) -> Project:
    root.mkdir()
    if quantize is None:
        quantize = python_of("quantize")
    project = Project(root)
    project.write(pipelines % {"python": python, "quantize": quantize, "model": model, "models": model.parent})
    rows = [{"prompt": f"Say the word number {i}.", "completion": f"word{i % 7}"} for i in range(60)]
    project.write("".join(json.dumps(row) + "\n" for row in rows), "words.jsonl")
    return project


def copied(project: Project, root: Path) -> Project:
    """The project in another folder, with its store: what it has built is cached there."""
    shutil.copytree(project.root, root, symlinks=True)
    return Project(root)
