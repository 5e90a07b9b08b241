"""Reads which license a model or dataset has, by its card. The answer is for reports; it is in no key and no payload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneline.kinds.model import ModelStage
    from tuneline.workspace.protocol import Request


def of_repository(repository: str, repository_type: str, commit: str) -> dict[str, str] | None:
    """Return the license in a card on the hub, as `of_card`, or None if there is no card, or it cannot be read, as offline."""
    from httpx2 import TransportError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return of_card(Path(hf_hub_download(repository, "README.md", repo_type=repository_type, revision=commit)))
    except (EntryNotFoundError, HfHubHTTPError, TransportError, OSError):
        return None


def of_card(card: Path) -> dict[str, str] | None:
    """Return `license` of a card's metadata; for one that is none of the hub's, also `license_name` and `license_link`."""
    from huggingface_hub import metadata_load

    try:
        metadata: Any = metadata_load(card) or {}
    except (OSError, ValueError):  # no card, or not YAML
        return None
    found = metadata.get("license")
    if isinstance(found, list):
        return {"license": "other", "license_name": ", ".join(map(str, found))}
    names = ("license", "license_name", "license_link") if found == "other" else ("license",)
    return {name: str(metadata[name]) for name in names if metadata.get(name)} or None


def of_model(request: Request, stage: ModelStage) -> dict[str, str] | None:
    """Return the license that the model's card names. GGUF files name one, too, but reading it takes seconds."""
    if stage.hub is not None:
        return of_repository(stage.hub, "model", request.commits["hub"])
    return of_card(request.files["path"][0] / "README.md") if stage.path is not None else None
