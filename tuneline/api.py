"""The Python API: `load`, `plan` and `run` do what the commands of these names do.

    from tuneline import plan, run

    for row in plan("demo"):
        print(row.stage, row.status)
    result = run("demo", overrides={"sft.lora.r": 32})
    print(result.metrics["eval"]["bookings/exact_match"], result.payload("merged"))

`run` starts `tuneline run` as a child process, which keeps its signals, Prefect settings and event loop apart from those of a
notebook. Called in a flow of Prefect it runs the pipeline as a subflow of that flow, in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tuneline.config.load import Loaded
from tuneline.config.load import load as load_file
from tuneline.config.overrides import as_sets
from tuneline.errors import ConfigError, Problem, TunelineError
from tuneline.paths import PACKAGES_ROOT
from tuneline.planning.plan import PlanRow, check_stages
from tuneline.planning.plan import plan as plan_rows
from tuneline.workspace.runs import RunRecord, StageRecord
from tuneline.workspace.workspace import Workspace

WITH_PARENT = "TUNELINE_END_WITH_PARENT"  # set for a run that must not outlive the process that started it
ARGUMENTS_WRONG = 2  # exit status of the command line


@dataclass(frozen=True)
class Run:
    """A run: its state, and what its stages made."""

    record: RunRecord
    workspace: Workspace

    @classmethod
    def last(cls, pipeline: str, file: str | Path = "pipelines.yaml", run_id: str | None = None) -> Run:
        """Return the last run of a pipeline, or the one named. Raises ConfigError if there is none."""
        workspace = Workspace(load(file))
        workspace.loaded.pipeline(pipeline)
        return cls(workspace.runs.get(pipeline, run_id), workspace)

    @property
    def id(self) -> str:
        return self.record.run_id

    @property
    def state(self) -> str:
        """`completed`, `failed`, `refused` (by a gate), `cancelled`, `killed` or `running`."""
        return self.record.state

    @property
    def stages(self) -> dict[str, StageRecord]:
        """Records by stage name: status, key, digest, metrics, message."""
        return {stage.stage: stage for stage in self.record.stages}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics by stage name."""
        return {stage.stage: stage.metrics for stage in self.record.stages if stage.metrics}

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.workspace.runs.folder / f"{self.id}.html"

    def payload(self, stage: str) -> Path:
        """Return the folder with what a stage made: a model, an adapter, rows or results. Raises ConfigError if it made nothing."""
        entry = self.stages.get(stage)
        artifact = self.workspace.store.find(entry.kind, entry.key) if entry and entry.key and entry.artifact else None
        if artifact is None:
            made = [name for name, each in self.stages.items() if each.artifact]
            raise ConfigError(
                [Problem("", f"found no artifact of `{stage}`, expected {', '.join(made) or 'a run that made one'}", place=self.id)]
            )
        return artifact.payload

    def __repr__(self) -> str:
        return f"Run({self.record.pipeline!r}, {self.id!r}, {self.state!r})"


class RunFailed(TunelineError):
    """Raised by `run` for a run that did not complete. `run` holds it."""

    def __init__(self, run: Run):
        reasons = [f"{name}: {stage.message}" for name, stage in run.stages.items() if stage.status in ("failed", "refused")]
        super().__init__("\n\n".join([f"{run.record.pipeline} {run.state} (run {run.id})", *reasons]))
        self.run = run


def load(
    file: str | Path = "pipelines.yaml",
    pipeline: str | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read and check a pipelines file. `overrides` ({"sft.lora.r": 32}) apply to `pipeline`, as `--set` does; `variables` as `--var` does.

    Raises ConfigError with every problem.
    """
    return load_file(Path(file), pipeline, as_sets(overrides or {}), as_sets(variables or {}))


def plan(
    pipeline: str,
    file: str | Path = "pipelines.yaml",
    *,
    overrides: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
) -> list[PlanRow]:
    """Return what a run would do: a row for each stage, in order, with status (`cached`, `run`, ...) and reasons. Raises ConfigError."""
    workspace = Workspace(load(file, pipeline, overrides=overrides, variables=variables))
    return plan_rows(workspace, pipeline, only, tuple(force))


def run(
    pipeline: str,
    file: str | Path = "pipelines.yaml",
    *,
    overrides: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
    check: bool = True,
) -> Run:
    """Run a pipeline and wait for its end; progress goes to `sys.stderr`.

    Raises ConfigError if the file or an argument is wrong, and RunFailed if the run fails, is refused by a gate or is cancelled;
    with `check=False` such a run is returned. KeyboardInterrupt cancels the run.
    """
    loaded = load(file, pipeline, overrides=overrides, variables=variables)
    check_stages(loaded, pipeline, only, force)
    arguments = {"overrides": dict(overrides or {}), "variables": dict(variables or {}), "only": only, "force": list(force)}
    start = _run_in_flow if _in_flow() else _run_as_process
    workspace = Workspace(loaded)
    ended = Run(workspace.runs.get(pipeline, start(pipeline, loaded.file, arguments)), workspace)
    if check and ended.state != "completed":
        raise RunFailed(ended)
    return ended


def _in_flow() -> bool:
    """Return whether the caller is inside a Prefect flow or task. Prefect is already imported if so."""
    context = sys.modules.get("prefect.context")
    return context is not None and bool(context.FlowRunContext.get() or context.TaskRunContext.get())


def _run_in_flow(pipeline: str, file: Path, arguments: dict[str, Any]) -> str:
    """Run the pipeline as a subflow; return the run's id."""
    known = sys.modules.get("flows")
    if known and PACKAGES_ROOT not in Path(known.__path__[0] if hasattr(known, "__path__") else known.__file__ or "/").resolve().parents:
        found = "found another package `flows` imported in this process, expected tuneline's"
        raise ConfigError([Problem("", found, "give yours another name, or `tuneline submit` the pipeline from your flow", place="run")])
    sys.path.insert(0, str(PACKAGES_ROOT))
    return str(import_module("flows.subflow").run_as_subflow(pipeline, file=str(file), **arguments))


def _run_as_process(pipeline: str, file: Path, arguments: dict[str, Any]) -> str:
    """Run `tuneline run` as a child process in a session of its own, so that Ctrl-C reaches it once, from here; return the run's id."""
    command = [sys.executable, "-m", "tuneline", "run", pipeline, "--file", str(file), "--json"]
    for flag, name in (("--set", "overrides"), ("--var", "variables")):
        command += [part for text in as_sets(arguments[name]) for part in (flag, text)]
    command += ["--only", arguments["only"]] if arguments["only"] else []
    command += [part for stage in arguments["force"] for part in ("--force", stage)]
    paths = os.pathsep.join(filter(None, (str(PACKAGES_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, WITH_PARENT: "1"}
    said: list[str] = []
    interrupted = False
    with tempfile.TemporaryFile() as answer:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        ) as child:
            while child.poll() is None:
                try:
                    for line in child.stderr or ():
                        said.append(line)
                        sys.stderr.write(line)
                    child.wait()
                except KeyboardInterrupt:
                    interrupted = True
                    child.send_signal(signal.SIGINT)
        if interrupted:  # the run has ended in order, as cancelled
            raise KeyboardInterrupt
        answer.seek(0)
        try:
            run_id = json.load(answer)["run_id"]
        except (ValueError, KeyError, TypeError):
            run_id = None
        if run_id is None:  # the run never began
            place = "run" if child.returncode == ARGUMENTS_WRONG else f"tuneline run (exit status {child.returncode})"
            raise ConfigError([Problem("", "".join(said[-20:]).strip() or "ended without a message", place=place)])
        return str(run_id)
