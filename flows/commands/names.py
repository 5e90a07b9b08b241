"""Shell completion of the names of pipelines, stages and runs. Completes nothing if the pipelines file cannot be read."""

from __future__ import annotations

from pathlib import Path

import click

from flows.folders import home_of, runs_in
from tuneline.config.load import load
from tuneline.config.spec import Pipeline
from tuneline.errors import TunelineError
from tuneline.workspace.runs import Runs


def pipelines_of(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    return [name for name in _pipelines(context) if name.startswith(begun)]


def stages_of(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Complete an argument PIPELINE/STAGE: pipelines, then the stages of the given one. Complete an option: stages of the pipeline."""
    pipelines = _pipelines(context)
    given = context.params.get("pipeline") or context.params.get("name")
    given = given or next(iter(context.args), None)  # an option without its value yet keeps click from reading arguments
    if given and "/" not in given:  # `chat` takes several PIPELINE/STAGE
        return [name for name in (pipelines[given].stages if given in pipelines else ()) if name.startswith(begun)]
    if "/" in begun:
        name = begun.partition("/")[0]
        return [full for stage in (pipelines[name].stages if name in pipelines else ()) if (full := f"{name}/{stage}").startswith(begun)]
    return [name for name in pipelines if name.startswith(begun)]


def runs_of(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Complete ids of runs, and for an argument pipelines too."""
    pipelines = _pipelines(context)
    pipeline = str(context.params.get("what") or "").partition("/")[0] or None
    runs = Runs(runs_in(home_of(_file(context).absolute().parent)))
    names = [record.run_id for record in runs.newest_first(pipeline)] + ([] if pipeline else list(pipelines))
    return [name for name in names if name.startswith(begun)]


def _pipelines(context: click.Context) -> dict[str, Pipeline]:
    try:
        return dict(load(_file(context)).spec.pipelines)
    except (TunelineError, OSError):
        return {}


def _file(context: click.Context) -> Path:
    return Path(context.params.get("file") or "pipelines.yaml")
