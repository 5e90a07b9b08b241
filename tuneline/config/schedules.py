"""Check the overrides of schedules like those of the command line, and report problems at their place in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuneline.config.load import Loaded, load
from tuneline.config.overrides import as_sets
from tuneline.config.yaml_source import Keys, dotted
from tuneline.errors import ConfigError, Problem


def check_schedules(loaded: Loaded) -> None:
    """Load the file once more for each schedule with overrides. Raises ConfigError with every problem found."""
    problems = [
        problem
        for name, pipeline in loaded.spec.pipelines.items()
        for key, schedule in pipeline.schedules.items()
        if schedule.overrides or schedule.variables
        for problem in _problems(loaded, name, ("pipelines", name, "schedules", key), schedule.overrides, schedule.variables)
    ]
    if problems:
        raise ConfigError(problems)


def _problems(loaded: Loaded, name: str, here: Keys, overrides: Mapping[str, Any], variables: Mapping[str, Any]) -> Iterator[Problem]:
    flags: dict[str, Keys] = {f"--set {field}": (*here, "overrides", field) for field in overrides}
    flags |= {f"--var {variable}": (*here, "variables", variable) for variable in variables}
    try:
        load(loaded.file, name, as_sets(overrides), as_sets(variables))
    except ConfigError as error:
        for problem in error.problems:
            path = flags.get(problem.place, here)
            # A problem of an override is reported at it; a problem that it causes elsewhere names its field.
            elsewhere = f"{problem.field}: " if problem.field and problem.place not in flags else ""
            yield Problem(dotted(path), elsewhere + problem.message, problem.hint, place=loaded.source.place(path))
