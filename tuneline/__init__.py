"""The core: configuration, keys, plans and the store. Imports neither prefect nor torch."""

from pathlib import Path

__version__ = "0.1.0"
PACKAGES_ROOT = Path(__file__).resolve().parent.parent
"""Folder with flows/, tasks/, tuneline/ and infra/: the clone, or `tuneline-packages` in site-packages. PYTHONPATH of programs."""
