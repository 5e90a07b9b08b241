"""The folders that a project keeps in `.tuneline`, beside its pipelines.yaml."""

from __future__ import annotations

from pathlib import Path


def home_of(root: Path) -> Path:
    """Return `.tuneline` of the project in the folder `root`."""
    return root / ".tuneline"


def runs_in(home: Path) -> Path:
    """Return the folder of the run records."""
    return home / "runs"


def work_in(home: Path) -> Path:
    """Return the folder of the work folders, which are named by key."""
    return home / "work"


def server_in(home: Path) -> Path:
    """Return the folder of the server of `tuneline up`."""
    return home / "server"
