"""What a branch or tag of a hub repository means right now: its commit. Looked up when a run starts, so that it can be in the key.

Offline (HF_HUB_OFFLINE=1) the local hub cache answers. Downloading is the programs' work, by huggingface_hub.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tuneline.errors import StageFailed
from tuneline.hub_cache import COMMIT, cache, cached_commit


def resolve_commit(repository_type: str, repository: str, revision: str) -> str:
    """`repository_type` is `model` or `dataset`. Raises StageFailed: auth, config or transient."""
    if COMMIT.match(revision):
        return revision
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return _cached(repository_type, repository, revision)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    address = f"{endpoint}/api/{repository_type}s/{repository}/revision/{urllib.parse.quote(revision, safe='')}"
    request = urllib.request.Request(address)
    if token := _token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["sha"])
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            hint = "check the name, ask for access on the hub, and set HF_TOKEN"
            raise StageFailed("auth", f"the hub refuses {repository} (HTTP {error.code})", hint) from None
        if error.code == 404:
            raise StageFailed("config", f"the hub has no {repository_type} {repository} at {revision}", "check both names") from None
        raise StageFailed("transient", f"the hub answers HTTP {error.code} for {repository}", "the stage is tried again") from None
    except (ValueError, KeyError):
        raise StageFailed("transient", f"the hub's answer for {repository} is no hub's", "is there a portal to log in to?") from None
    except OSError as error:
        hint = "check the network; or write a full commit as `revision:`, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        raise StageFailed("transient", f"the hub cannot be reached for {repository}: {error}", hint) from None


def _cached(repository_type: str, repository: str, revision: str) -> str:
    commit = cached_commit(repository_type, repository, revision)
    if commit is None:
        hint = "download it once with the network on, or write a full commit as `revision:`"
        raise StageFailed("config", f"{repository} at {revision} is not in the local hub cache {cache()}, and HF_HUB_OFFLINE is set", hint)
    return commit


def _token() -> str | None:
    """HF_TOKEN, or what `hf auth login` left."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    return file.read_text().strip() if file.is_file() else None
