"""Ends a flow process whose worker has died.

A process worker that is killed with -9 leaves its flow processes running: no new worker adopts them, and nothing that a user does in the UI
reaches them any more. So a flow that runs in a pool watches its parent, and ends in order, as on a SIGTERM, once that is another.
"""

from __future__ import annotations

import os
import signal
import threading
import time

SECONDS = 1.0  # between two looks


def end_with_parent() -> None:
    """Starts the watch; it ends with the process."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
