"""Update a stage's progress artifact in Prefect from a separate thread, with a log line every so often.

A request to a server that is down blocks for more than a minute, but the loop that supervises a program must not block. So that loop
only leaves the latest event here. A lost event does not matter, because others follow.
"""

from __future__ import annotations

import contextvars
import threading
import time

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.report.eta import Eta
from tuneline.workspace.protocol import Event

SECONDS = 2.0  # between updates at the beginning; each is a request, and an event that the server stores
LINE_SECONDS = 30.0  # between log lines at the beginning
SLOWER = 0.01  # share of the elapsed time that is added to both


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
        """Publish the latest event, if the server answers at once."""
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
                except Exception:  # whatever Prefect's client raises: a training does not fail because of its progress bar
                    pass
                if not ended and (now := time.monotonic()) - said >= pause(now - began, LINE_SECONDS):
                    get_run_logger().info(text)
                    said = now
            if ended:
                return
            self._ended.wait(pause(time.monotonic() - began, SECONDS))


def pause(worked: float, least: float) -> float:
    """Return the seconds until the next update: 300 updates and 80 lines in the first hour of a stage, 520 and 220 in ten hours."""
    return least + SLOWER * worked
