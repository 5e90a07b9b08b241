"""Fixtures of the flow tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_project import PIPELINES
from once import once
from pico_project import make
from processes import gone, until
from project import Project, python_of

from tuneline.config.load import load
from tuneline.workspace.runs import RunRecord

# sitecustomize.py: at its end, each program writes which modules it has imported, and how many objects its garbage collector skips.
SITECUSTOMIZE = """\
import atexit, gc, json, sys
from pathlib import Path

def write(request):
    names = sorted(name for name, module in sys.modules.items() if module is not None and "." not in name)
    found = {"modules": names, "frozen": gc.get_freeze_count(), "others": len(gc.get_objects())}
    Path(__file__).with_name(f"{request['kind']}-{request['key']}.json").write_text(json.dumps(found))

if Path("request.json").exists():
    atexit.register(write, json.loads(Path("request.json").read_bytes()))
"""


@pytest.fixture(autouse=True)
def processes_where_they_are_asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("process"):
        monkeypatch.setattr(Project, "warm", False)


@pytest.fixture(scope="session")
def program_python(runtime_python: Path) -> Path:
    """Python of the programs, except in `pico_run`, where each kind runs in a new process. A warm one would be named here."""
    return runtime_python


@pytest.fixture(scope="session")
def program_runtimes(tmp_path_factory: pytest.TempPathFactory, runtime_python: Path, program_python: Path) -> Path:
    """Return a folder for TUNELINE_RUNTIMES whose runtime `torch` is `program_python`."""
    real = runtime_python.parents[1]
    runtimes = tmp_path_factory.mktemp("program") / ".tuneline" / "runtimes"
    (runtimes / real.name / "bin").mkdir(parents=True)
    shutil.copyfile(real / "tuneline-complete", runtimes / real.name / "tuneline-complete")
    python = runtimes / real.name / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {program_python} "$@"\n')
    python.chmod(0o755)
    return runtimes


@pytest.fixture(scope="session")
def pico_run(tmp_path_factory: pytest.TempPathFactory, runtime_python: Path, pico_model: Path, prefect_server: str) -> Project:
    """Run each kind of program except grpo on a pico model, kill the run with -9 during its training, and run it again.

    Tests that change the project must copy it.
    """

    def build(root: Path) -> None:
        python, quantize = root / "imports" / "python", root / "imports" / "quantize"
        project, mark = make(root, python, pico_model, quantize=quantize), f"pico-{os.getpid()}"
        project.write(SITECUSTOMIZE, "imports/sitecustomize.py")
        for wrapper, real in ((python, runtime_python), (quantize, python_of("quantize"))):
            wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={wrapper.parent}:$PYTHONPATH exec {real} "$@"\n')
            wrapper.chmod(0o755)
        process = project.start("run", "pico", MARK=mark, PYTHONHASHSEED="1")
        until(lambda: list(root.glob(".tuneline/work/*/checkpoints/checkpoint-*/complete")), process)
        process.kill()
        process.communicate()
        assert gone(mark)
        assert not list(root.glob(".tuneline/store/sft/*/*"))  # nothing half-written is visible
        again = project.tuneline("run", "pico", "--verbose")
        assert "base: cached" in again.stderr
        assert "sft: done" in again.stderr
        assert "sft: started (sft, resumes from step " in again.stderr
        assert "resuming from checkpoint-" in again.stderr

    return Project(once(tmp_path_factory, "pico_run", build))


@pytest.fixture
def demo(project: Project, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Project:
    project.write(PIPELINES)
    for name in ("one", "two", "other", "after"):
        project.write(name, f"{name}.txt")
    return project


@pytest.fixture
def run(demo: Project, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunRecord, Any]]:
    """Run the pipeline in this process; return the record and Prefect's view of the run."""
    import flows.run.stage

    monkeypatch.setattr(flows.run.stage, "RETRY_DELAYS", [0.1])

    def ended(tasks: list[Any], number: int) -> bool:
        return len(tasks) == number and all(task.state is not None and task.state.is_final() for task in tasks)

    def go(*sets: str, **options: Any) -> tuple[RunRecord, Any]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        from flows.pipeline import run_pipeline
        from tuneline.config.overrides import as_overrides
        from tuneline.workspace.workspace import Workspace

        state = run_pipeline.with_options(name="demo")("demo", overrides=as_overrides("--set", sets), return_state=True, **options)
        record = Workspace(load(demo.root / "pipelines.yaml")).runs.get("demo", None)
        with get_client(sync_client=True) as client:
            runs = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
            # Prefect records task runs from events, some time later if a run was deleted before.
            until(lambda: ended(client.read_task_runs(flow_run_filter=runs), len(record.stages)))
            tasks = client.read_task_runs(flow_run_filter=runs)
        return record, {
            "flow": state.name,
            "id": state.state_details.flow_run_id,
            **{task.name.partition(": ")[0]: task.state.name for task in tasks if task.state},
        }

    return go


@pytest.fixture(scope="module")
def no_server_of_the_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        yield
