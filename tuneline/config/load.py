"""Load pipelines.yaml into a Spec, or report all its problems at once.

    read the file -> apply --set and --var -> substitute ${variables} -> check types (pydantic) -> check what types cannot express

Nothing here depends on the machine: a valid file is valid everywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuneline.config.checks import BUILT_IN_RUNTIMES, Checks, keys_of
from tuneline.config.hints import foreign
from tuneline.config.messages import translate
from tuneline.config.other_tools import IMPORTED
from tuneline.config.overrides import Overrides
from tuneline.config.spec import Pipeline, Spec
from tuneline.config.yaml_source import Keys, YamlDocument, dotted, read
from tuneline.errors import ConfigError, Problem
from tuneline.wording import listed, nearest, shown

__all__ = ["BUILT_IN_RUNTIMES", "Loaded", "check", "load"]


@dataclass(frozen=True)
class Loaded:
    """A valid file: its spec, source and overrides."""

    spec: Spec
    file: Path
    source: YamlDocument
    overrides: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.file.parent

    def pipeline(self, name: str) -> Pipeline:
        """Return a pipeline by name. Raises ConfigError for an unknown name."""
        if name not in self.spec.pipelines:
            known = list(self.spec.pipelines)
            found = f"found no pipeline `{name}`, expected {listed(known)}"
            raise ConfigError([Problem("", found, nearest(name, known), place=self.source.name)])
        return self.spec.pipelines[name]

    def placed(self, problem: Problem, pipeline: str, stage: str) -> Problem:
        """Return a problem of a stage with the whole name of its field, and its place in the file."""
        path = ("pipelines", pipeline, "stages", stage, *keys_of(problem.field))
        return Problem(dotted(path), problem.message, problem.hint, place=self.source.place(path))

    def warnings(self, pipeline: str | None = None) -> list[Problem]:
        """Return settings that are valid but suspicious, of one pipeline or of all."""
        found = []
        for name, stages in ((name, each.stages) for name, each in self.spec.pipelines.items() if pipeline in (None, name)):
            for stage_name, stage in stages.items():
                found += [self.placed(problem, name, stage_name) for problem in stage.warnings()]
        return found


def load(
    file: Path,
    pipeline: str | None = None,
    sets: Sequence[str] = (),
    variables: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Loaded:
    """Read and check `file`. `sets` (`stage.field=value`) apply to `pipeline`, `variables` are `name=value`.

    Raises ConfigError with every problem found.
    """
    source = read(file, _shown(file))
    return check(source, file.absolute(), pipeline, sets, variables, environment)


def check(
    source: YamlDocument,
    file: Path,
    pipeline: str | None = None,
    sets: Sequence[str] = (),
    variables: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Loaded:
    if not isinstance(source.tree, dict):
        empty = source.tree is None
        found = "the file is empty" if empty else f"found {shown(source.tree)}, expected a mapping with version, pipelines, ..."
        raise ConfigError(
            [Problem("", found, "run `tuneline init` in an empty folder to create a file to start from", place=source.place(()))]
        )
    if other := foreign(source.tree):
        found = f"found a configuration of {other}, expected a tuneline file with `pipelines:`"
        hint = "`tuneline init` writes a file to start from; docs/coming-from.md lists the fields"
        if other.partition(" (")[0] in IMPORTED:
            hint = f"`tuneline import {source.name}` translates it"
        raise ConfigError([Problem("", found, hint, place=source.place(()))])
    overrides = Overrides(source, environment)
    tree = overrides.applied(pipeline, sets, variables)
    problems = overrides.problems

    def report(path: Keys, message: str, hint: str, at_key: bool) -> None:
        if any(unresolved[: len(path)] == path for unresolved in overrides.unresolved):
            return  # a consequence of an unknown variable, which is reported itself
        if path in overrides.origins:
            name = overrides.origins[path]
            hint = f"{hint}; the value comes from" if hint else "the value comes from"
            hint += f" ${{{name}}}, {source.place(('vars', name))}"
        problems.append(Problem(dotted(path), message, hint, place=source.place(path, at_key)))

    spec: Spec | None = None
    try:
        spec = Spec.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        for path, at_key, message, hint in translate(error, tree):
            report(path, message, hint, at_key)
    Checks(file.parent, tree, spec, report).run()
    if problems or spec is None:
        raise ConfigError(sorted(set(problems), key=_order))
    return Loaded(spec, file, source, (*sets, *(f"--var {variable}" for variable in variables)))


def _order(problem: Problem) -> tuple[Any, ...]:
    """Sort by place in the file: line 9 before line 10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", problem.place))), problem.field


def _shown(file: Path) -> str:
    try:
        return str(file.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
