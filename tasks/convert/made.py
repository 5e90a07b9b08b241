"""Holds the facts of a model card: manifests of the history of an export, and the names of its stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.convert.usage import Adapter
from tuneline.config.spec import STAGES
from tuneline.kinds.export import ExportStage
from tuneline.kinds.stage import ProgramStage
from tuneline.workspace.artifact import Manifest


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


def sources(dataset: Manifest) -> list[dict[str, Any]]:
    return list(dataset.document["config"]["sources"])
