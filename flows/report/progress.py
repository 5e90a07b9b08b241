"""Prefect's progress bar of a stage and what stands beside it, kept up to date by a thread of its own; now and then a line in its log, too.

A request to a server that is away blocks for more than a minute, and the loop that supervises a program must not: it only
leaves the latest event here. Losing one is fine, there will be another.
"""

from __future__ import annotations

import contextvars
import threading
import time

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.report.eta import Eta
from tuneline.workspace.protocol import Event

SECONDS = 2.0  # between two updates at the beginning: each is a request, and an event that the server keeps
LINE_SECONDS = 30.0  # between two lines in the log
SLOWER = 0.01  # of the time that the stage has worked, beside these


class ProgressArtifact:
    def __init__(self, stage: str):
        self._pace = Eta(stage)
        self._news, self._ended = threading.Event(), threading.Event()
        context = contextvars.copy_context()  # Prefect finds the task run there
        self._thread = threading.Thread(target=context.run, args=(self._publish,), daemon=True)
        self._thread.start()

    def show(self, event: Event) -> None:
        if self._pace.take(event):
            self._news.set()

    def close(self) -> None:
        """Publishes what is left, if the server answers at once."""
        self._ended.set()
        self._news.set()
        self._thread.join(SECONDS)

    def _publish(self) -> None:
        artifact, began = None, time.monotonic()
        said = began
        while True:
            self._news.wait()
            self._news.clear()
            latest, ended = self._pace.latest, self._ended.is_set()
            if latest:
                percent, text = latest
                try:
                    if artifact is None:
                        artifact = create_progress_artifact(percent, description=text)
                    else:
                        update_progress_artifact(artifact, percent, description=text)  # type: ignore[arg-type]
                except Exception:  # whatever Prefect's client raises: a training does not end for a progress bar
                    pass
                if not ended and (now := time.monotonic()) - said >= pause(now - began, LINE_SECONDS):
                    get_run_logger().info(text)
                    said = now
            if ended:
                return
            self._ended.wait(pause(time.monotonic() - began, SECONDS))


def pause(worked: float, least: float) -> float:
    """Seconds until the next update: 300 updates and 80 lines in the first hour of a stage, 520 and 220 in ten hours."""
    return least + SLOWER * worked
