"""The pure core: WHAT runs, what it is called, and whether it is there already. Imports neither prefect nor torch."""

__version__ = "0.1.0"
