"""The core: configuration, keys, plans and the store. Imports neither prefect nor torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneline.api import Run, RunFailed, load, plan, run

__all__ = ["Run", "RunFailed", "load", "plan", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the Python API at its first use: programs and quick commands do without it."""
    if name in __all__:
        from tuneline import api

        return getattr(api, name)
    raise AttributeError(f"module 'tuneline' has no attribute {name!r}")
