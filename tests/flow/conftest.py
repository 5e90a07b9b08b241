"""Fixtures of the flow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from demo_project import PIPELINES
from project import Project

from tuneline.load import load
from tuneline.runs import RunRecord


@pytest.fixture
def demo(project: Project, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Project:
    project.write(PIPELINES)
    for name in ("one", "two", "other", "after"):
        project.write(name, f"{name}.txt")
    return project


@pytest.fixture
def run(demo: Project, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunRecord, Any]]:
    """Runs the pipeline in this process; returns the record and Prefect's own view of the run."""
    import flows.stage

    monkeypatch.setattr(flows.stage, "RETRY_DELAYS", [0.1])

    def go(*sets: str, **options: Any) -> tuple[RunRecord, Any]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        from flows.pipeline import run_pipeline
        from tuneline.overrides import as_overrides
        from tuneline.workspace import Workspace

        state = run_pipeline.with_options(name="demo")("demo", overrides=as_overrides("--set", sets), return_state=True, **options)
        record = Workspace(load(demo.root / "pipelines.yaml")).runs.get("demo", None)
        with get_client(sync_client=True) as client:
            runs = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            tasks = client.read_task_runs(flow_run_filter=runs)
        return record, {
            "flow": state.name,
            "id": state.state_details.flow_run_id,
            **{task.name: task.state.name for task in tasks if task.state},
        }

    return go


@pytest.fixture(scope="module")
def no_server_of_the_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        yield
