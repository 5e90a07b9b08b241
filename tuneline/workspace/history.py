"""How an artifact was made: the manifests of all artifacts that it was made from, and the names of their stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuneline.errors import StageFailed
from tuneline.kinds.fields import Reference, annotated_values
from tuneline.kinds.stage import Stage
from tuneline.workspace.artifact import Artifact, Manifest
from tuneline.workspace.file_names import MANIFEST
from tuneline.workspace.protocol import Input
from tuneline.workspace.store import Store


def input_slots(stage: Stage) -> dict[str, str]:
    """Return slot to stage name for every reference that is an input; `needs` only orders stages."""
    return {path: target for path, reference, target in annotated_values(stage, Reference) if not path.startswith("needs.")}


def input_of(store: Store, artifact: Artifact) -> Input:
    """Return what a request says of an artifact. Raises StageFailed(data) if the base of an adapter is gone."""
    manifest = artifact.manifest
    base = None
    if manifest.base:
        found = store.find(manifest.base.kind, manifest.base.key)
        if found is None:
            hint = f"rebuild it: `--force` its stage of kind {manifest.base.kind}"
            base_name = f"{manifest.base.kind}/{manifest.base.key[:12]}"
            raise StageFailed("data", f"the base model of an adapter, {base_name}, is no longer in the store", hint)
        base = input_of(store, found)
    return Input(path=artifact.payload, digest=manifest.digest, type=manifest.type, template=manifest.template, base=base)


def names_in_history(stages: Mapping[str, Stage], stage: Stage, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the stage's name for each artifact in the history of a stage's inputs, by `kind/key`, each after those that it was made from.

    `stages`: the pipeline's. Manifests name their inputs by slot, the stages name them by the same fields, so the two are walked together.
    An artifact that is no longer in the store is left out, with what it was made from.
    """
    found: dict[str, str] = {}

    def visit(folder: Path, name: str) -> None:
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            return
        slots = input_slots(stages[name]) if name in stages else {}
        for slot, parent in sorted(manifest.parents.items()):
            if parent not in found:
                kind, _, key = parent.partition("/")
                visit(folder.parents[2] / kind / key[:2] / key, slots.get(slot, kind))
        found[f"{manifest.kind}/{manifest.key}"] = name

    slots = input_slots(stage)
    for slot, artifact in inputs.items():
        if f"{artifact.manifest.kind}/{artifact.key}" not in found:
            visit(artifact.path, slots[slot])
    return found


def manifests_in_history(history: Mapping[str, str], store: Path) -> dict[str, Manifest]:
    """Return the manifests of a history by `kind/key`, in its order. `store`: the store's folder."""
    found = {}
    for name in history:
        kind, _, key = name.partition("/")
        found[name] = Manifest.model_validate_json((store / kind / key[:2] / key / MANIFEST).read_bytes())
    return found
