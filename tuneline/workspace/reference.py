"""Local models, stored by reference: their content is in the digest, their location is not.

    payload/reference.json    the files with size and sha256
    meta/location.json        the folder, and the mtimes of its files when they were last compared

So the same model in two folders is one artifact. On a cache hit, its location is set to the folder that the pipeline names,
whose content has just been compared, because it is in the key.
"""

from __future__ import annotations

import json
from pathlib import Path

from tuneline.errors import StageFailed
from tuneline.files import write_atomically
from tuneline.workspace.file_names import META, PAYLOAD

REFERENCE, LOCATION = "reference.json", "location.json"


def point(artifact: Path, folder: Path) -> None:
    """Write the current location of a reference's files. `artifact`: the folder with payload/ and meta/."""
    names = [entry["path"] for entry in json.loads((artifact / PAYLOAD / REFERENCE).read_bytes())["files"]]
    document = {"path": str(folder), "mtimes": {name: (folder / name).stat().st_mtime_ns for name in names}}
    write_atomically(artifact / META / LOCATION, json.dumps(document, indent=1) + "\n")


def folder_of(payload: Path) -> Path:
    """Return the Hugging Face folder of a Model's payload: itself, or its referenced folder. Raises StageFailed if that has changed."""
    if not (payload / REFERENCE).exists():
        return payload
    location = json.loads((payload.parent / META / LOCATION).read_bytes())
    folder = Path(location["path"])
    for entry in json.loads((payload / REFERENCE).read_bytes())["files"]:
        file = folder / entry["path"]
        facts = (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None
        if facts != (entry["size"], location["mtimes"][entry["path"]]):
            raise StageFailed("data", f"{file} has changed since the run began", "run again to use its new content")
    return folder
