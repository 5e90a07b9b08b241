"""LLaMA-Factory's datasets: names in `dataset_info.json`, which describes files and repositories."""

from __future__ import annotations

import json
import os
from pathlib import PurePosixPath
from typing import Any

from tuneline.config.hints import repository
from tuneline.imports.translation import Translation, exists

COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations", "kto_tag": "label"}
"""Columns of LLaMA-Factory's formats, under the names of ours."""
ROLES = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
}


def source_of(translation: Translation, named: str) -> dict[str, Any]:
    """Return the source of one dataset, as `dataset_info.json` describes it."""
    folder = str(translation.value("dataset_dir", default="data"))
    found = _described(translation, folder, named)
    if found is None:
        source = file_or_hub(translation, named if repository(named) else f"{folder}/{named}.json")
        translation.remarks.append(f"`{named}` is in no dataset_info.json that was found: check its source")
    else:
        info, folder = found
        source = _from_info(translation, info, folder, named)
    limit = translation.value("max_samples")
    if isinstance(limit, int) and limit > 0:
        source["max_rows"] = min(limit, source.get("max_rows", limit))
        translation.origins.setdefault(("data", "sources"), "max_samples")
    if translation.value("stage") == "pt":
        source["format"] = "text"
    return source


def _described(translation: Translation, folder: str, named: str) -> tuple[dict[str, Any], str] | None:
    for at in (folder, "."):
        file = translation.job.path(f"{at}/dataset_info.json")
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            continue
        except (ValueError, RecursionError):
            broken = f"`{PurePosixPath(at, 'dataset_info.json')}` cannot be read as JSON: correct it and import again"
            translation.remarks += [] if broken in translation.remarks else [broken]
            continue
        if isinstance(info, dict) and isinstance(info.get(named), dict):
            return info[named], str(file.parent)
    return None


def _from_info(translation: Translation, info: dict[str, Any], folder: str, named: str) -> dict[str, Any]:
    hub, columns = info.get("hf_hub_url") or info.get("ms_hub_url"), info.get("columns")
    columns = columns if isinstance(columns, dict) else {}
    if hub:
        source: dict[str, Any] = {"type": "hub", "repo": str(hub)}
        source |= {"subset": str(info["subset"])} if info.get("subset") else {}
        source |= {"split": str(info["split"])} if info.get("split", "train") != "train" else {}
        if "hf_hub_url" not in info:
            translation.remarks.append(f"`{named}` is on ModelScope: `repo` must be its name on the Hugging Face hub")
    else:
        name = str(info.get("file_name") or f"{named}.json")
        path = translation.job.path(f"{folder}/{name}")
        source = {"type": "files", "path": translation.local(f"{path}/*" if os.path.isdir(path) else str(path))}
    given = info.get("tags")
    tags = given if isinstance(given, dict) else {}
    by_role = tags.get("role_tag") == "role"
    if info.get("ranking") is True:
        source["format"] = "preference"
    elif info.get("formatting", "alpaca") != "alpaca":
        source["format"] = "messages" if by_role else "sharegpt"
    ours = {COLUMNS.get(theirs, theirs): column for theirs, column in columns.items() if isinstance(column, str)}
    if by_role:
        ours = {"messages" if name == "conversations" else name: column for name, column in ours.items()}
    if multimodal := [name for name in ("images", "videos", "audios") if ours.pop(name, None)]:
        translation.remarks.append(f"`{named}` has {' and '.join(multimodal)}: tuneline trains text models only")
    renamed = {name: column for name, column in ours.items() if name != column}
    if translation.value("stage") == "pt":
        renamed = {"text": columns["prompt"]} if columns.get("prompt", "text") != "text" else {}
    if renamed:
        source["columns"] = renamed
    if unknown := [f"{tag}: {tags[tag]}" for tag, known in ROLES.items() if tag in tags and tags[tag] not in known]:
        translation.remarks.append(
            f"`{named}` has names of roles that tuneline does not know ({', '.join(unknown)}): rename them in the file"
        )
    if isinstance(info.get("num_samples"), int):
        source["max_rows"] = info["num_samples"]
    return source


def file_or_hub(translation: Translation, named: str) -> dict[str, Any]:
    hub = repository(named)
    return (
        {"type": "hub", "repo": hub}
        if hub and not exists(translation.job.path(named))
        else {"type": "files", "path": translation.local(named)}
    )
