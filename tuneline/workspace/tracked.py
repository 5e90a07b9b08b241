"""How trackers know an unfinished training: WORK/trackers.json. A resumed training, also of another run, continues its curves there."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from tuneline.files import write_atomically
from tuneline.workspace.file_names import TRACKERS


class Tracked(BaseModel):
    name: str
    """PIPELINE/STAGE/RUN, after the run that began the training."""
    links: dict[str, str] = {}
    """Address of the training's page, or how to see its curves, by tracker."""
    ids: dict[str, str] = {}
    """Ids that servers have given it, by tracker."""

    def write(self, work: Path) -> None:
        write_atomically(work / TRACKERS, self.model_dump_json(indent=1))


def tracked(work: Path, name: str = "") -> Tracked:
    """Return what is known; `name` is the name of a training that begins."""
    try:
        return Tracked.model_validate_json((work / TRACKERS).read_bytes())
    except FileNotFoundError:
        return Tracked(name=name)
