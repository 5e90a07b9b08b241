"""Runs a pipeline as a subflow of the flow that calls: the part of `tuneline.run` that needs Prefect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect.client.schemas import State

from flows.pipeline import REPORTER, run_pipeline
from flows.run.run_context import NoReporter


class _Noting(NoReporter):
    """Keeps the id of the run."""

    run_id: str | None = None

    def began(self, run_id: str, page: str | None) -> None:
        object.__setattr__(self, "run_id", run_id)


def run_as_subflow(pipeline: str, **parameters: Any) -> str:
    """Return the id of the run once it has ended, in whatever state. Raises what the flow raised before the run began."""
    noting = _Noting()
    token = REPORTER.set(noting)
    try:
        flow: Callable[..., State[Any]] = run_pipeline.with_options(name=pipeline)
        state = flow(pipeline=pipeline, return_state=True, **parameters)
    finally:
        REPORTER.reset(token)
    if noting.run_id is None:
        state.result()
        raise RuntimeError(f"the run of {pipeline} ended as {state.name} before it began")
    return noting.run_id
