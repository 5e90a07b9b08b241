"""Entrypoints of deployments: `tuneline.deployed.NAME` is the flow of the pipeline NAME, `tuneline.deployed.run_stage` that of
stages with their own pool.

A worker imports them from its own installation. PACKAGES_ROOT comes first on the path: other packages named `flows` and `tasks` may
be installed there or in a folder of PYTHONPATH.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from tuneline.paths import PACKAGES_ROOT


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    sys.path.insert(0, str(PACKAGES_ROOT))
    return getattr(import_module("flows.pipeline"), name)  # by name: no module of the core depends on flows
