"""Prefect's progress bar of a stage and what stands beside it, kept up to date by a thread of its own.

A request to a server that is away blocks for more than a minute, and the loop that supervises a program must not: it only
leaves the latest event here. Losing one is fine, there will be another.
"""

from __future__ import annotations

import contextvars
import threading

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.report import duration
from tuneline.protocol import Event

SECONDS = 2.0  # between two updates: each is a request


class Pace:
    """How far a program is, in words: `sft: step 30 of 100, loss 1.2345, 2,048 tokens/s, about 1 min 10 s left`."""

    def __init__(self, stage: str):
        self._stage, self._tokens_per_second = stage, 0.0
        self._first: tuple[float, int] | None = None  # (when, step); a resumed training does not begin at 0
        self.latest: tuple[float, str] | None = None  # (percent, words)

    def take(self, event: Event) -> bool:
        """Whether there is something new to show."""
        if event.type == "metric" and event.name == "tokens_per_second" and event.value:
            self._tokens_per_second = event.value
        if event.type != "progress" or not event.total:
            return False
        step = event.step or 0
        if self._first is None or step < self._first[1]:  # a new phase counts anew
            self._first = (event.t, step)
        parts = [f"step {step:,} of {event.total:,}", *([event.message] if event.message else [])]
        if self._tokens_per_second:
            parts.append(f"{self._tokens_per_second:,.0f} tokens/s")
        began, first = self._first
        if first < step < event.total:
            parts.append(f"about {duration((event.t - began) / (step - first) * (event.total - step))} left")
        self.latest = min(100.0, 100.0 * step / event.total), f"{self._stage}: {', '.join(parts)}"
        return True


class ProgressArtifact:
    def __init__(self, stage: str):
        self._pace = Pace(stage)
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
        artifact = None
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
            if ended:
                return
            self._ended.wait(SECONDS)
