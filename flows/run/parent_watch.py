"""End a flow process whose worker has died.

A process worker that is killed with -9 leaves its flow processes running: no new worker adopts them, and the UI can no longer cancel them.
So a flow that runs in a pool polls its parent process id, and shuts down gracefully, as on SIGTERM, once that changes.
"""

from __future__ import annotations

import os
import signal
import threading
import time

SECONDS = 1.0  # between two polls


def end_with_parent() -> None:
    """Start the watch, in a thread that ends with the process."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
