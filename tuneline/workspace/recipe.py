"""The pipeline that made an artifact, written from manifests: every stage as it ran, with overrides, and pinned by commits and digests.

Manifests hold contents, not places: a file's path becomes `sha256:DIGEST.SUFFIX`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import yaml

from tuneline.workspace.artifact import Manifest


def recipe(history: Mapping[str, str], manifests: Mapping[str, Manifest]) -> str:
    """Return YAML in the form of a pipelines file. `history`: names of stages by `kind/key`, in order; `manifests`: by the same."""
    stages = {history[artifact]: _stage(manifest, history) for artifact, manifest in manifests.items()}
    document = {"version": 1, "pipelines": {"made": {"stages": stages}}}
    return str(yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True))


def _stage(manifest: Manifest, history: Mapping[str, str]) -> dict[str, Any]:
    document = manifest.document
    fields: dict[str, Any] = {"kind": manifest.kind}
    for slot, parent in manifest.parents.items():
        _put(fields, slot, history.get(parent, parent))
    fields |= deepcopy(document.get("config", {}))
    for slot, files in document.get("files", {}).items():
        _put(fields, slot, _files(files))
    for slot, commit in document.get("commits", {}).items():
        if not slot.startswith("benchmarks"):  # data of benchmarks is no field
            _put(fields, f"{slot.rpartition('.')[0]}.revision".lstrip("."), commit)
    return fields


def _files(files: list[dict[str, Any]]) -> str:
    named = [f"sha256:{file['sha256']}{file.get('suffix', '')}" for file in files]
    return named[0] if len(named) == 1 else f"{len(named)} files, the first {named[0]}"


def _put(fields: Any, slot: str, value: Any) -> None:
    """Set a dotted field. Numbers are indices of lists, which are made as long as needed."""
    *path, last = (int(part) if part.isdecimal() else part for part in slot.split("."))
    for key, following in zip(path, [*path[1:], last], strict=False):
        fresh: Any = [] if isinstance(following, int) else {}
        if isinstance(fields, list):
            fields += [{} for _ in range(int(key) + 1 - len(fields))]
            fields = fields[int(key)]
        else:
            fields = fields.setdefault(key, fresh)
    if isinstance(fields, list):
        fields += [None] * (int(last) + 1 - len(fields))
    fields[last] = value
