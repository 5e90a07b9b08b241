"""Find the data of lm-eval's benchmarks in its task files, without importing lm-eval, so that the data's commits can be in a key.

A task file is YAML that names a `dataset_path`. It may `include` others. A group lists tasks, and a tag stands for all tasks with it.
Reading lm-eval's 14,000 files takes a second, so the result is cached: a runtime's folder never changes.

    name    `task: arc_easy`, `group: mmlu` with `task: [...]`, or `tag: ai2_arc`
    data    a repository of the hub, files (json, csv ...), or what Python code beside the file loads (`class`, `custom_dataset`)

As in lm-eval, the stage's own files take precedence over those of the runtime. Data loaded by code is not covered here; only
`tasks.evaluation.benchmarks` sees it.
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
# Values of `dataset_path` that name a reader of local files (datasets/packaged_modules); others are a repository or a folder.
READERS = frozenset("arrow audiofolder csv hdf5 imagefolder json lance pandas parquet sql text videofolder webdataset xml".split())
FORMAT = 1  # version of the cache files
KEPT = ("task", "group", "tag", "dataset_path", "dataset_kwargs", "class", "custom_dataset")
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?$")
CODE = "code of its own loads it"


class Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Loads plain data; `!function utils.process` stays text."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix}")


@dataclass(frozen=True, order=True)
class Data:
    """Data of a benchmark: a repository at a revision, or the reason why it is unknown."""

    repository: str = ""
    revision: str = "main"
    unknown: str = ""

    @property
    def label(self) -> str:
        """Name of the data in keys and requests."""
        return self.repository if self.revision == "main" else f"{self.repository}@{self.revision}"


NOT_SET_UP = Data(unknown="the runtime is not set up")
MISSING = Data(unknown="lm-eval has no task file of this name")


def data_of(name: str, own: Path | None, runtime: RuntimeEnvironment, memory: Path) -> list[Data]:
    """Return the benchmark's data, each repository once. `own`: the stage's folder of task files; `memory`: the cache folder."""
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
    """Return the config of a group member that is defined inline, on its own or as changes to a named task."""
    return {**index.get(str(entry.get("task")), {}), **entry} if isinstance(entry, dict) else None


# --- task files -------------------------------------------------------------------------------------------------------


def task_files(folder: Path) -> dict[str, Config]:
    """Return the data settings of each task, group and tag below `folder`. Like lm-eval, skips files that are not task files."""
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
    """Return the task files of the runtime's lm-eval; empty if it has none."""
    environment = runtime.folder or runtime.python.parent.parent
    known = memory / f"{environment.name}-{FORMAT}.json"
    if runtime.folder:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(known.read_bytes()))
    index: dict[str, Config] = {}
    for folder in environment.glob("lib/python3*/site-packages/lm_eval/tasks"):
        index = task_files(folder)
    if runtime.folder and runtime.ready:  # an environment of the user may change
        with contextlib.suppress(OSError):  # on a read-only folder, the files are read again next time
            memory.mkdir(parents=True, exist_ok=True)
            write_atomically(known, json.dumps(index))
    return index


def is_group(config: Config) -> bool:
    """Return whether a config is a group. One with `class` is a task, even if it has `group`."""
    return "group" in config and "class" not in config


def _whole(file: Path, read: Callable[[Path], Config], above: tuple[Path, ...]) -> Config:
    """Return a config with its includes; its own values take precedence."""
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
        config = yaml.load(file.read_bytes(), Loader=Loader)
        return {key: config[key] for key in (*KEPT, "include") if key in config} if isinstance(config, dict) else {}
    return {}
