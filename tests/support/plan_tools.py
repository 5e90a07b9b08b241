"""A pipeline to plan, and artifacts put into its store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneline.config.load import load
from tuneline.planning.plan import PlanRow, plan
from tuneline.workspace.artifact import Base, Manifest
from tuneline.workspace.history import input_slots
from tuneline.workspace.runs import StageRecord
from tuneline.workspace.workspace import Workspace

PIPELINES = """\
version: 1
pipelines:
  demo:
    stages:
      base:   {kind: model, path: base}
      data:   {kind: dataset, model: base, sources: [{type: files, path: "rows/*.jsonl"}]}
      sft:    {kind: sft, model: base, dataset: data, lora: {r: 16}}
      merged: {kind: merge, adapters: [sft]}
      eval:   {kind: evaluate, model: merged, datasets: [data]}
      gate:   {kind: gate, require: [{metric: data/exact_match, of: eval, at_least: 0.5}]}
"""


def planned(folder: Path, *sets: str, **options: Any) -> dict[str, PlanRow]:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", sets))
    return {row.stage: row for row in plan(workspace, "demo", **options)}


def build(folder: Path, *sets: str, payload: str = "1") -> dict[str, PlanRow]:
    """Publishes an artifact for every stage that would run, one after the other, and records the run."""
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", sets))
    record = workspace.runs.begin("demo", ())
    while True:
        rows = {row.stage: row for row in plan(workspace, "demo")}
        row = next((row for row in rows.values() if row.status == "run" and row.key), None)
        if row is None:
            break
        publish(workspace, row, rows, payload)
    for row in rows.values():
        fields = {"key": row.key, "document": row.document, "digest": row.artifact.digest if row.artifact else None}
        record.stages.append(StageRecord(stage=row.stage, kind=row.kind, status="done", **fields))
    workspace.runs.finish(record, "completed")
    return rows


def publish(workspace: Workspace, row: PlanRow, rows: dict[str, PlanRow], payload: str) -> None:
    stage = workspace.loaded.spec.pipelines["demo"].stages[row.stage]
    base = None
    if stage.output_type() == "Adapter":
        model = rows["base"].artifact
        assert model is not None
        base = Base(kind="model", key=model.key, digest=model.digest, template=None)
    assert row.key is not None
    with workspace.store.locked(row.key):
        built = workspace.store.staging_dir(row.key)
        (built / "payload").mkdir()
        (built / "payload" / "data").write_text(f"{row.kind} {payload}")
        parents = {slot: f"{rows[other].kind}/{rows[other].key}" for slot, other in input_slots(stage).items()}
        facts = {"parents": parents, "metrics": {}, "info": {}, "host": {}, "base": base, "document": row.document}
        workspace.store.publish(
            built,
            lambda digest, files: Manifest(kind=row.kind, type=stage.output_type(), key=row.key or "", digest=digest, files=files, **facts),
        )
