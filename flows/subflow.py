"""Runs a pipeline as a subflow of the flow that calls: the part of `tuneline.run` that needs Prefect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from prefect.client.schemas import State
from prefect.exceptions import ObjectNotFound

from flows.pipeline import REPORTER, run_pipeline
from flows.run.run_context import NoReporter


class _Noting(NoReporter):
    """Keeps the id of the run, and the signal that has ended it."""

    run_id: str | None = None
    signal: BaseException | None = None

    def began(self, run_id: str, page: str | None) -> None:
        self.run_id = run_id

    def interrupted(self, error: BaseException) -> None:
        self.signal = error


def run_as_subflow(pipeline: str, **parameters: Any) -> str:
    """Return the id of the run once it has ended, in whatever state. Raises what the flow raised before the run began, and the signal
    (KeyboardInterrupt, Prefect's TerminationSignal) that ended it: the flow that calls ends with it."""
    noting = _Noting()
    token = REPORTER.set(noting)
    try:
        flow: Callable[..., State[Any]] = run_pipeline.with_options(name=pipeline)
        state = flow(pipeline=pipeline, return_state=True, **parameters)
    except (ObjectNotFound, httpx.HTTPError):  # the run was deleted on the server, and so ended; or the server is gone: its record has all
        if noting.run_id is None:
            raise
    finally:
        REPORTER.reset(token)
    if noting.signal is not None:
        raise noting.signal
    if noting.run_id is None:
        state.result()
        raise RuntimeError(f"the run of {pipeline} ended as {state.name} before it began")
    return noting.run_id
