"""Exit codes, and the message of an interrupted command. It is imported first, and imports nothing that takes time."""

from __future__ import annotations

FAILED, WRONG, REFUSED = 1, 2, 3
EXIT = {"completed": 0, "failed": FAILED, "refused": REFUSED, "cancelled": 130}
INTERRUPTED = "interrupted; run again to resume"
