"""An artifact of the store as the input of a program."""

from __future__ import annotations

from tuneline.errors import StageFailed
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.protocol import Input
from tuneline.workspace.store import Store


def input_of(artifact: Artifact, store: Store) -> Input:
    """Return the artifact as an input, with the Model that an Adapter was trained on. Raises StageFailed(data) if that one is gone."""
    manifest, base = artifact.manifest, None
    if manifest.base:
        found = store.find(manifest.base.kind, manifest.base.key)
        if found is None:
            hint = f"rebuild it: `--force` its stage of kind {manifest.base.kind}"
            base_name = f"{manifest.base.kind}/{manifest.base.key[:12]}"
            raise StageFailed("data", f"the base model of an adapter, {base_name}, is no longer in the store", hint)
        base = input_of(found, store)
    return Input(path=artifact.payload, digest=manifest.digest, type=manifest.type, template=manifest.template, base=base)
