"""What programs that stay write to the command line: lines of JSON on a stdout of their own."""

from __future__ import annotations

import os
import traceback
from typing import Any, TextIO

from tuneline.errors import StageFailed


def own_stdout() -> TextIO:
    """Return stdout, which from now on nobody else has: what libraries print goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def failed(error: Exception) -> dict[str, Any]:
    if isinstance(error, StageFailed):
        return {"type": "failed", "class": error.failure_class, "message": error.message, "hint": error.hint}
    traceback.print_exception(error)
    kind = "oom" if isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__ else "bug"
    return {"type": "failed", "class": kind, "message": f"{type(error).__name__}: {error}", "hint": ""}
