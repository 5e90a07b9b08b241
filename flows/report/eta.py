"""The progress of a program, from the events that it sends."""

from __future__ import annotations

from flows.report.format import duration
from tuneline.workspace.protocol import Event


class Eta:
    """Describes the progress of a program: `sft: step 30 of 100, loss 1.2345, 2,048 tokens/s, about 1 min 10 s left`."""

    def __init__(self, stage: str):
        self._stage, self._tokens_per_second = stage, 0.0
        self._first: tuple[float, int] | None = None  # (time, step); a resumed training does not begin at 0
        self.latest: tuple[float, str] | None = None  # (percent, text)

    def take(self, event: Event) -> bool:
        """Process an event. Returns whether `latest` has changed."""
        if event.type == "metric" and event.name == "tokens_per_second" and event.value:
            self._tokens_per_second = event.value
        if event.type != "progress" or not event.total:
            return False
        step = event.step or 0
        if self._first is None or step < self._first[1]:  # a new phase starts its own count
            self._first = (event.t, step)
        parts = [f"step {step:,} of {event.total:,}", *([event.message] if event.message else [])]
        if self._tokens_per_second:
            parts.append(f"{self._tokens_per_second:,.0f} tokens/s")
        began, first = self._first
        if first < step < event.total:
            parts.append(f"about {duration((event.t - began) / (step - first) * (event.total - step))} left")
        self.latest = min(100.0, 100.0 * step / event.total), f"{self._stage}: {', '.join(parts)}"
        return True
