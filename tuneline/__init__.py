"""The pure core: WHAT runs, what it is called, and whether it is there already. Imports neither prefect nor torch."""

from pathlib import Path

__version__ = "0.1.0"
PACKAGES_ROOT = Path(__file__).resolve().parent.parent
"""Folder of flows/, tasks/, tuneline/ and infra/: the clone, or `tuneline-packages` in site-packages. Programs get it as PYTHONPATH."""
