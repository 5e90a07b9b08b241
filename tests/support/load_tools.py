"""A good pipelines.yaml, and loading of a changed one."""

from __future__ import annotations

from pathlib import Path

from tuneline.config.load import Loaded, check
from tuneline.config.yaml_source import parse

GOOD = """\
version: 1
vars: {rank: 16}
pipelines:
  demo:
    stages:
      base:   {kind: model, path: models/base}
      data:   {kind: dataset, sources: [{type: files, path: rows.jsonl}], split: {test: 0.1}}
      sft:    {kind: sft, model: base, dataset: data, lora: {r: "${rank}"}, global_batch_size: 8}
      merged: {kind: merge, adapters: [sft]}
      gptq:   {kind: quantize, model: merged, calibration: data}
      eval:   {kind: evaluate, model: sft, datasets: [data]}
      gate:   {kind: gate, require: [{metric: data/exact_match, of: eval, at_least: 0.5}]}
"""


def load_text(text: str, pipeline: str | None = None, sets: tuple[str, ...] = (), variables: tuple[str, ...] = ()) -> Loaded:
    return check(parse(text, "p.yaml"), Path("/project/p.yaml"), pipeline, sets, variables, environment={})
