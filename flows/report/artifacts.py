"""Publish a run's name, tags and markdown artifacts (one for each stage and one for the run) to Prefect.

A request to a server that is down blocks for more than a minute. So one thread makes them all, in order. At its end a run waits for it
SECONDS at most; the run's record and its HTML report hold the same content.
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

SECONDS = 10.0  # for which a run waits, at its end, for unfinished requests


class Publisher:
    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def markdown(self, name: str, render: Callable[[], str], description: str) -> None:
        """Create an artifact of the caller's task or flow run. Calls `render` in the publisher's thread."""
        self._put(lambda: create_markdown_artifact(render(), key=key_for(name), description=description))

    def name_run(self, name: str, tags: Iterable[str]) -> None:
        """Name the caller's flow run, unless a user has named it, and add tags to those of its deployment."""

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
    except Exception as error:  # whatever Prefect's client raises: no stage fails because its artifact does
        get_run_logger().warning(f"not shown in Prefect: {type(error).__name__}: {error}")


def _generated(name: str) -> bool:
    """Return whether Prefect generated the name, from two words of its lists, such as `brave-otter`."""
    parts = name.split("-")
    return len(parts) == 2 and all(part in _words() for part in parts)


@lru_cache
def _words() -> frozenset[str]:
    from coolname.data import config

    lists = [each["words"] for each in config.values() if isinstance(each, dict) and each["type"] == "words"]
    return frozenset(str(word) for listed in lists for word in listed)


def key_for(name: str) -> str:
    """Return the artifact key: Prefect allows lower-case letters, digits and dashes, and keeps a key's history over all runs."""
    return re.sub("[^a-z0-9-]", "-", name.lower())
