"""Resolve a branch or tag of a hub repository to its current commit: for keys when a run starts, and for `tuneline plan --online`, which
also reads the models' config.json.

huggingface_hub asks: proxies, tokens, redirects and retries are its work. Offline (HF_HUB_OFFLINE=1) the local hub cache answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from tuneline.errors import StageFailed
from tuneline.workspace.hub_cache import COMMIT, HubCache, cache_folder, cached_commit, cached_file

T = TypeVar("T")
SECONDS = 30  # for an answer of the hub


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
        if _offline():
            return None
        from huggingface_hub import hf_hub_download

        return _answered(
            f"config.json of {repository}",
            lambda: Path(
                hf_hub_download(repository, "config.json", revision=commit, endpoint=_endpoint(), etag_timeout=SECONDS)
            ).read_bytes(),
        )


def resolve_commit(repository_type: str, repository: str, revision: str) -> str:
    """Return the commit of a revision. `repository_type`: `model` or `dataset`. Raises StageFailed: auth, config or transient."""
    if COMMIT.match(revision):
        return revision
    if _offline():
        return _cached(repository_type, repository, revision)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    return _answered(
        f"{repository_type} {repository} at {revision}",
        lambda: str(api.repo_info(repository, revision=revision, repo_type=repository_type, timeout=SECONDS).sha),
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


def _answered(what: str, ask: Callable[[], T]) -> T:
    """Return the hub's answer. Raises StageFailed: auth, config or transient."""
    from httpx2 import TransportError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return ask()
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, GatedRepoError):
            hint = "check the name, ask for access on the hub, and set HF_TOKEN"
            raise StageFailed("auth", f"the hub refuses {what} (HTTP {status})", hint) from None
        if status == 404:
            raise StageFailed("config", f"the hub has no {what}", "check both names") from None
        raise StageFailed("transient", f"the hub answers HTTP {status} for {what}", "a run retries the stage automatically") from None
    except (OSError, TransportError, LocalEntryNotFoundError) as error:
        hint = "check the network, or use a folder (`path:`); earlier downloads are used with HF_HUB_OFFLINE=1 or a full commit"
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise StageFailed("transient", f"the hub cannot be reached for {what}: {reason}", hint) from None
    except (ValueError, KeyError, TypeError):
        message = f"the answer for {what} does not come from the hub"
        raise StageFailed("transient", message, "check whether the network has a login page") from None


def _cached(repository_type: str, repository: str, revision: str) -> str:
    commit = cached_commit(repository_type, repository, revision)
    if commit is None:
        found = f"{repository} at {revision} is not in the local hub cache {cache_folder()}, and HF_HUB_OFFLINE is set"
        raise StageFailed("config", found, "download it once with the network on, or write a full commit as `revision:`")
    return commit
