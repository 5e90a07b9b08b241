"""Which data lm-eval's benchmarks are made of, so that its commits can be in a key: read from its task files, without lm-eval.

A task file is YAML that names a `dataset_path`; it may `include` others, a group lists tasks, and a tag names all tasks that carry it.
lm-eval's own 14,000 take a second to read, so what they say is remembered: a runtime's folder never changes.

    name    `task: arc_easy`, `group: mmlu` with `task: [...]`, or `tag: ai2_arc`
    data    a repository of the hub, files (json, csv ...), or what Python code beside the file loads (`class`, `custom_dataset`)

As in lm-eval, files of the stage's own come before those of the runtime. Left out: what code loads, which only
`tasks.evaluation.benchmarks` sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tuneline.files import write_atomically
from tuneline.workspace.runtimes import RuntimeEnvironment

Config = dict[str, Any]
# Words of `dataset_path` that say how local files are read (datasets/packaged_modules); any other is a repository or a folder.
READERS = frozenset("arrow audiofolder csv hdf5 imagefolder json lance pandas parquet sql text videofolder webdataset xml".split())
FORMAT = 1  # of what is remembered
KEPT = ("task", "group", "tag", "dataset_path", "dataset_kwargs", "class", "custom_dataset")
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?$")
CODE = "code of its own loads it"


class Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Plain data; `!function utils.process` stays text."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix}")


@dataclass(frozen=True, order=True)
class Data:
    """What a benchmark loads: a repository at a revision, or why that is not known."""

    repository: str = ""
    revision: str = "main"
    unknown: str = ""

    @property
    def label(self) -> str:
        """Its name in a key, and for the program that loads it."""
        return self.repository if self.revision == "main" else f"{self.repository}@{self.revision}"


NOT_SET_UP = Data(unknown="the runtime is not set up")
MISSING = Data(unknown="lm-eval has no task file of this name")


def data_of(name: str, own: Path | None, runtime: RuntimeEnvironment, memory: Path) -> list[Data]:
    """What the benchmark loads, each repository once. `own` is the stage's folder of task files, `memory` one for what is remembered."""
    index = task_files(own) if own else {}
    found = set(_data(name, index, own, ()))
    if MISSING in found:
        found = set(_data(name, _of_runtime(runtime, memory) | index, own, ()))
    return sorted(found)


def _data(name: Any, index: dict[str, Config], own: Path | None, above: tuple[str, ...]) -> Iterator[Data]:
    config = index.get(name) if isinstance(name, str) else _inline(name, index)
    if config is None or name in above:
        yield MISSING
        return
    members = config.get("task") if is_group(config) else config.get("tagged")
    if members is not None:
        for member in members if isinstance(members, list) else [members]:
            yield from _data(member, index, own, (*above, str(name)))
        return
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if config.get("class") or config.get("custom_dataset"):
        yield Data(unknown=CODE)
    elif path in READERS:
        if "://" in json.dumps(options):
            yield Data(unknown="its files are on the network")
    elif not isinstance(path, str) or not REPOSITORY.match(path):
        yield Data(unknown=f"dataset_path is {path}")
    elif not (own and (own / path).exists()):
        yield Data(path, str(options.get("revision") or "main"))


def _inline(entry: Config, index: dict[str, Config]) -> Config | None:
    """A member of a group that is written out there, as a task of its own or over one that has a name."""
    return {**index.get(str(entry.get("task")), {}), **entry} if isinstance(entry, dict) else None


# --- task files -------------------------------------------------------------------------------------------------------


def task_files(folder: Path) -> dict[str, Config]:
    """What each task, group and tag below `folder` says about its data. Files that are no task files are passed over, as lm-eval does."""
    index: dict[str, Config] = {}
    tags: dict[str, list[str]] = {}
    read = lru_cache(maxsize=None)(_read)
    for file in sorted(folder.rglob("*.yaml"), key=Path.as_posix):
        config = _whole(file, read, ())
        group = is_group(config)
        name = config.get("group" if group else "task")
        if not isinstance(name, str) or name in index:
            continue
        index[name] = {key: config[key] for key in KEPT if config.get(key) is not None}
        if not group:
            listed = config.get("tag") or []
            for tag in [listed] if isinstance(listed, str) else listed:
                tags.setdefault(tag, []).append(name)
    return {tag: {"tagged": names} for tag, names in tags.items()} | index


@lru_cache
def _of_runtime(runtime: RuntimeEnvironment, memory: Path) -> dict[str, Config]:
    """Those of the runtime's lm-eval; none where it has no such folder."""
    environment = runtime.folder or runtime.python.parent.parent
    known = memory / f"{environment.name}-{FORMAT}.json"
    if runtime.folder:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(known.read_bytes()))
    index: dict[str, Config] = {}
    for folder in environment.glob("lib/python3*/site-packages/lm_eval/tasks"):
        index = task_files(folder)
    if runtime.folder and runtime.ready:  # a Python of the user's own may change
        with contextlib.suppress(OSError):  # a read-only folder only costs time
            memory.mkdir(parents=True, exist_ok=True)
            write_atomically(known, json.dumps(index))
    return index


def is_group(config: Config) -> bool:
    """A class is a task, whatever it calls its group."""
    return "group" in config and "class" not in config


def _whole(file: Path, read: Callable[[Path], Config], above: tuple[Path, ...]) -> Config:
    """With what it includes, its own words coming first."""
    config = read(file)
    included = config.get("include") or []
    whole: Config = {}
    for name in [included] if isinstance(included, str) else included:
        path = Path(os.path.normpath(file.parent / name))
        if path not in above:
            whole |= _whole(path, read, (*above, file))
    return whole | config


def _read(file: Path) -> Config:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        config = yaml.load(file.read_bytes(), Loader=Loader)  # noqa: S506  (a SafeLoader)
        return {key: config[key] for key in (*KEPT, "include") if key in config} if isinstance(config, dict) else {}
    return {}
