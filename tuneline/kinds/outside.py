"""What a stage reads from outside of the store: the hub, source trees, folders, benchmarks.

Planning asks a stage's class for it, so that it knows no kind. Paths are marked in the fields themselves (`OutsideFile`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from tuneline.kinds.fields import Strict

if TYPE_CHECKING:
    from tuneline.kinds.sources import CodeSource


class ReadsOutside(Strict):
    """Answers for a stage that reads nothing but files."""

    hidden_files_in: ClassVar[frozenset[str]] = frozenset()
    """Fields of folders whose hidden files are read, too."""

    def repositories(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield (field, repository type `model` or `dataset`, repository, revision) of everything that the fields name on the hub."""
        return iter(())

    def source_trees(self) -> dict[str, CodeSource]:
        """Return the source trees, by the field of their path."""
        return {}

    def row_files(self) -> frozenset[str]:
        """Return the fields that name files of rows, for which a folder is an error."""
        return frozenset()

    def lm_eval_tasks(self) -> Iterator[tuple[str, str]]:
        """Yield (field, name) of the benchmarks that lm-eval runs."""
        return iter(())

    def own_lm_eval_tasks(self) -> str | None:
        """Return the path of a folder with the stage's own task files for lm-eval."""
        return None
