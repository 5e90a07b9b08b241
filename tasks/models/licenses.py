"""Reads which license a model or dataset has, by its card. The answer is for reports; it is in no key and no payload."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def of_repository(repository: str, repository_type: str, commit: str) -> str | None:
    """Return the license in a card on the hub, or None if there is no card, or it cannot be read, as offline."""
    from httpx2 import TransportError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return of_card(Path(hf_hub_download(repository, "README.md", repo_type=repository_type, revision=commit)))
    except (EntryNotFoundError, HfHubHTTPError, TransportError, OSError):
        return None


def of_card(card: Path) -> str | None:
    """Return the license in a card's metadata, or the name of a license that is none of the hub's."""
    from huggingface_hub import metadata_load

    try:
        metadata: Any = metadata_load(card) or {}
    except (OSError, ValueError):  # no card, or not YAML
        return None
    named = metadata.get("license")
    return str(metadata.get("license_name", named)) if named == "other" else str(named) if named else None
