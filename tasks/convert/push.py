"""Pushes a folder to the hub in one commit, by huggingface_hub.

A push can be repeated: the hub keeps the large files of a push that was interrupted, so the next one uploads only the others; and if
the branch holds the same files already, no commit is made. What the author wrote into the card on the hub, under `Intended use`, is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneline.errors import StageFailed
from tuneline.kinds.export import ExportStage
from tuneline.workspace.artifact import sizes
from tuneline.workspace.cards import author_text, with_author_text
from tuneline.workspace.file_names import BASE, CARD
from tuneline.workspace.protocol import Events

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
AGAIN = "a run retries it, `tuneline export` can be repeated: files that were uploaded are not uploaded again"
# Files of an earlier push that loaders would read beside the new ones. All others that are not ours stay.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "generation_config.json", "chat_template.jinja")


def open_repository(stage: ExportStage, events: Events) -> Callable[[Path], dict[str, str]]:
    """Create the repository and the branch if they are missing. Return the function that pushes a folder into them, and returns where
    it is.

    Called before anything is written, so that a token without access costs no time. Raises StageFailed: auth, config (also for a
    public repository, unless the stage allows it) or transient.
    """
    from huggingface_hub import HfApi, is_offline_mode

    assert stage.push is not None
    token = os.environ.get("HF_TOKEN")
    if is_offline_mode():
        raise StageFailed("config", f"push: found HF_HUB_OFFLINE, which forbids a push to {stage.push}", "unset it")
    if not token:
        raise StageFailed("auth", f"push: found no token for {stage.push}", "set HF_TOKEN in the environment to a token that may write")
    repository, api = stage.push, HfApi(token=token)

    def prepare() -> None:
        api.create_repo(repository, private=stage.private, exist_ok=True)
        private = api.repo_info(repository).private
        if stage.private and not private:
            hint = "`private: false`, or `--public`, pushes to it; its settings on the hub make it private"
            raise StageFailed("config", f"push: found the public repository {repository}, expected a private one", hint)
        if private and not stage.private:
            events.warning(f"push: the repository {repository} exists, and stays private: its settings on the hub make it public")
        if stage.revision != "main":
            api.create_branch(repository, branch=stage.revision, exist_ok=True)

    def push(folder: Path) -> dict[str, str]:
        commit = answered(stage, lambda: _commit(api, repository, stage, folder))
        return {"repository": repository, "revision": stage.revision, "commit": str(commit.oid), "url": str(commit.commit_url)}

    answered(stage, prepare)
    return push


def _commit(api: HfApi, repository: str, stage: ExportStage, folder: Path) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repository, revision=stage.revision)
    names = [name for name, _ in sizes(folder)]
    card = (folder / CARD).read_text(encoding="utf-8")
    if CARD in there:
        earlier = Path(api.hf_hub_download(repository, CARD, revision=stage.revision)).read_text(encoding="utf-8", errors="replace")
        card = with_author_text(card, author_text(earlier))
    gone = [name for name in there if name not in names and _of_model(name)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in gone),
        *(CommitOperationAdd(name, card.encode() if name == CARD else folder / name) for name in names),
    ]
    return api.create_commit(repository, operations, commit_message=f"Export {stage.of}", revision=stage.revision)


def _of_model(name: str) -> bool:
    """Return whether a file is part of an exported model: in the root, or in the folder of an adapter's base."""
    folder, _, last = name.rpartition("/")
    return folder in ("", BASE) and any(fnmatch(last, pattern) for pattern in REPLACED)


def answered(stage: ExportStage, ask: Callable[[], T]) -> T:
    """Return the hub's answer. Raises StageFailed: auth, config or transient."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask()
    except HfHubHTTPError as error:
        status, place = error.response.status_code, f"{stage.push} at {stage.revision}"
        if status in (401, 403):
            hint = "check the name, and that the token in HF_TOKEN may write there"
            raise StageFailed("auth", f"push: the hub refuses {place} (HTTP {status})", hint) from None
        if status in (400, 404, 413, 422):
            raise StageFailed("config", f"push: the hub refuses {place}: {error.server_message or error}", "check the names") from None
        raise StageFailed("transient", f"push: the hub answers HTTP {status} for {place}", AGAIN) from None
    except ValueError as error:  # the hub's check of the card's metadata
        raise StageFailed("config", f"push: the hub refuses the model card: {error}", "`license` takes the hub's names") from None
    except (OSError, TransportError) as error:
        raise StageFailed("transient", f"push: the hub cannot be reached: {error}", AGAIN) from None
