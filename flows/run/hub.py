"""Resolve a branch or tag of a hub repository to its current commit: for keys when a run starts, and for `tuneline plan --online`, which
also reads the models' config.json.

Offline (HF_HUB_OFFLINE=1) the local hub cache is used. The programs download files themselves, with huggingface_hub.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path

from tuneline.errors import StageFailed
from tuneline.workspace.hub_cache import COMMIT, HubCache, cache_folder, cached_commit, cached_file


class Hub(HubCache):
    """Ask the hub, once for each question. The methods raise StageFailed as `resolve_commit` does."""

    @cache  # noqa: B019  (one instance, which lives as long as the process)
    def commit(self, repository_type: str, repository: str, revision: str) -> str:
        return resolve_commit(repository_type, repository, revision)

    @cache  # noqa: B019
    def config(self, repository: str, revision: str) -> bytes | None:
        commit = self.commit("model", repository, revision)
        if file := cached_file(repository, commit, "config.json"):
            return file.read_bytes()
        return None if _offline() else _fetched(f"{repository}/raw/{commit}/config.json", f"config.json of {repository}")


def resolve_commit(repository_type: str, repository: str, revision: str) -> str:
    """Return the commit of a revision. `repository_type`: `model` or `dataset`. Raises StageFailed: auth, config or transient."""
    if COMMIT.match(revision):
        return revision
    if _offline():
        return _cached(repository_type, repository, revision)
    answer = _fetched(
        f"api/{repository_type}s/{repository}/revision/{urllib.parse.quote(revision, safe='')}",
        f"{repository_type} {repository} at {revision}",
    )
    try:
        return str(json.loads(answer)["sha"])
    except (ValueError, KeyError):
        raise StageFailed(
            "transient", f"the answer for {repository} does not come from the hub", "check whether the network has a login page"
        ) from None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _fetched(path: str, what: str) -> bytes:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{path}")
    if token := _token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            hint = "check the name, ask for access on the hub, and set HF_TOKEN"
            raise StageFailed("auth", f"the hub refuses {what} (HTTP {error.code})", hint) from None
        if error.code == 404:
            raise StageFailed("config", f"the hub has no {what}", "check both names") from None
        raise StageFailed("transient", f"the hub answers HTTP {error.code} for {what}", "a run retries the stage automatically") from None
    except OSError as error:
        hint = "check the network; or write a full commit as `revision:`, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        raise StageFailed("transient", f"the hub cannot be reached for {what}: {getattr(error, 'reason', error)}", hint) from None


def _cached(repository_type: str, repository: str, revision: str) -> str:
    commit = cached_commit(repository_type, repository, revision)
    if commit is None:
        found = f"{repository} at {revision} is not in the local hub cache {cache_folder()}, and HF_HUB_OFFLINE is set"
        raise StageFailed("config", found, "download it once with the network on, or write a full commit as `revision:`")
    return commit


def _token() -> str | None:
    """Return HF_TOKEN, or the token that `hf auth login` saved."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    return file.read_text().strip() if file.is_file() else None
