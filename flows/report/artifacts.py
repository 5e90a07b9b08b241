"""What a run tells Prefect beside states and logs: its name and tags, and a markdown artifact for each stage and for the whole.

A request to a server that is away blocks for more than a minute. So one thread makes them all, in order; a run never waits
for it longer than SECONDS, at its end, and what could not be told is in the run's record and its HTML report.
"""

from __future__ import annotations

import contextvars
import re
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from queue import SimpleQueue

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

SECONDS = 10.0  # that a run waits, at its end, for what is still to be told


class Publisher:
    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def markdown(self, name: str, render: Callable[[], str], description: str) -> None:
        """For the task or flow run of the caller; `render` is called in the publisher's thread."""
        self._put(lambda: create_markdown_artifact(render(), key=key_for(name), description=description))

    def name_run(self, name: str, tags: Iterable[str]) -> None:
        """Names the caller's flow run, unless a user has named it, and adds tags to those that its deployment gave it."""

        def rename() -> None:
            with get_client(sync_client=True) as client:
                new = name if _generated(flow_run.name) else None
                client.update_flow_run(flow_run.id, name=new, tags=sorted({*flow_run.tags, *tags}))

        self._put(rename)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(SECONDS)

    def _put(self, job: Callable[[], object]) -> None:
        context = contextvars.copy_context()  # Prefect finds the run there
        self._jobs.put(partial(context.run, _attempt, job))

    def _work(self) -> None:
        while job := self._jobs.get():
            job()


def _attempt(job: Callable[[], object]) -> None:
    try:
        job()
    except Exception as error:  # whatever Prefect's client raises: no stage fails for what is shown of it
        get_run_logger().warning(f"not shown in Prefect: {type(error).__name__}: {error}")


def _generated(name: str) -> bool:
    """Whether Prefect has made the name up, of two words of its lists, as `brave-otter`."""
    words = name.split("-")
    return len(words) == 2 and all(word in _words() for word in words)


@lru_cache
def _words() -> frozenset[str]:
    from coolname.data import config  # type: ignore[import-untyped]

    return frozenset(str(word) for of_kind in config.values() if of_kind["type"] == "words" for word in of_kind["words"])


def key_for(name: str) -> str:
    """Prefect allows small letters, digits and dashes, and keeps the history of a key over all runs."""
    return re.sub("[^a-z0-9-]", "-", name.lower())
