"""Selection of a source tree's files, compared with git itself, and their part of the key."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tuneline.config.load import load
from tuneline.kinds.sources import CodeSource
from tuneline.kinds.stage import ProgramStage
from tuneline.planning.inputs import ResolvedInputs, resolve
from tuneline.planning.plan import plan
from tuneline.trees.file_memory import FileMemory, Look
from tuneline.trees.gitignore import Patterns
from tuneline.trees.licenses import allows, recognised
from tuneline.trees.select import Selection, select, walk
from tuneline.workspace.workspace import Workspace

MIT = """MIT License

Copyright (c) 2024 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED."""
ISC = """Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted,
provided that the above copyright notice and this permission notice appear in all copies."""
BSD = """Redistribution and use in source and binary forms, with or without modification, are permitted provided that the following
conditions are met: 1. Redistributions of source code must retain the above copyright notice."""


def source(**fields: object) -> CodeSource:
    return CodeSource(type="code", path="tree", **fields)  # type: ignore[arg-type]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def chosen(folder: Path, **fields: object) -> Selection:
    return select(folder, source(**fields), look())


def look() -> Look:
    return Look(FileMemory(Path(os.devnull)))


# --- git --------------------------------------------------------------------------------------------------------------

GIT = ["git", "-c", "core.excludesFile=/dev/null", "-c", "core.quotePath=false", "-c", "safe.directory=*"]


def listed_by_git(folder: Path) -> list[str]:
    """Return the files that git would add. None is tracked, so only the ignore rules decide."""
    command = [*GIT, "ls-files", "-z", "--others", "--exclude-standard"]
    return sorted(os.fsdecode(subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout).split("\0"))[1:]


def repository(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    subprocess.run([*GIT, "init", "-q", "."], cwd=folder, check=True)
    return folder


def walked(folder: Path) -> list[str]:
    return sorted(prefix + entry.name for prefix, _, kept in walk(folder, Patterns(()), Counter(), look()) for entry in kept)


def test_nested_ignore_files_are_respected_as_git_does(tmp_path: Path) -> None:
    top = repository(tmp_path / "top")
    write(
        top,
        {
            ".gitignore": "*.log.py\n/root.py\nlogs/\nkeep/*\n!keep/me.py\n**/deep/**/x.py\ndoc/**\n!doc/a.py\n\\#odd.py\nspace\\ \n#no\n\n",
            "a/.gitignore": "!x.log.py\nb.py\n/only.py\n*.t?p\n[!a-y]s.py\n",
            "a/c/.gitignore": "!b.py\r\n",
            **dict.fromkeys(("root.py", "a/root.py", "x.log.py", "a/x.log.py", "a/y.log.py", "logs/x.py", "a/logs/x.py", "keep/me.py", "keep/not.py", "keep/in/me.py", "deep/x.py", "deep/1/2/x.py", "a/deep/1/x.py", "doc/a.py", "doc/b.py", "#odd.py", "a/b.py", "a/c/b.py", "a/only.py", "a/c/only.py", "a/z.tmp", "a/zs.py", "a/as.py", "space ", "space", "été/ü.py"), "x = 1\n"),
        },
    )  # fmt: skip
    expected = listed_by_git(top)
    assert expected == [
        ".gitignore", "a/.gitignore", "a/as.py", "a/c/.gitignore", "a/c/b.py", "a/c/only.py", "a/root.py", "a/x.log.py", "doc/a.py", "keep/me.py",
        "space", "été/ü.py",
    ]  # fmt: skip
    assert walked(top) == expected
    # A subfolder of the repository is subject to the same rules, including those of its parents.
    assert [f"a/{name}" for name in walked(top / "a")] == [name for name in expected if name.startswith("a/")]


parts = st.sampled_from(["a", "b", "ab", "a.py", "b.py", "[a", "a b", "a\\", "!a", "#", "*", "é"])
names = st.lists(st.lists(parts, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6)
globs = st.text("ab*?[]!-^\\/. #é:y", max_size=8) | st.lists(
    st.sampled_from(["a", "b", "*", "**", "?", "/", "/", "!", "[ab]", "[!a]", "*.py", "a*", "\\*", "[[:alpha:]]", "***", " "]), max_size=6
).map("".join)
ignore_files = st.dictionaries(st.sampled_from(["", "a/", "a/b/"]), st.lists(globs, min_size=1, max_size=4), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def empty_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("git") / "tree")


@settings(max_examples=int(os.environ.get("GIT_EXAMPLES", 120)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=names, rules=ignore_files)
@example(names=["a/b.py", "a/b", "ab"], rules={"": ["*", "!*/", "!*.py"]})  # libraries consider the files in `a` matched
@example(names=["a/b/a.py", "a/ab"], rules={"": ["a/*", "!a/b/"], "a/b/": ["*"]})
def test_ignore_rules_are_gits(empty_repository: Path, names: list[str], rules: dict[str, list[str]]) -> None:
    for entry in sorted(empty_repository.rglob("*"), reverse=True):
        if ".git" not in entry.parts:
            entry.rmdir() if entry.is_dir() else entry.unlink()
    for name in [*names, *(f"{folder}.gitignore" for folder in rules)]:
        file = empty_repository / name
        folders = [folder for folder in file.parents if folder.is_relative_to(empty_repository)]
        if file.is_dir() or any(folder.is_file() for folder in folders):
            continue  # another name already made it a folder or a file
        text = "\n".join(rules[name.removesuffix(".gitignore")]) if name.endswith(".gitignore") else "content"
        write(empty_repository, {name: text + "\n"})
    assert walked(empty_repository) == listed_by_git(empty_repository)


@pytest.mark.parametrize(
    ("pattern", "takes", "leaves"),
    [
        ("*.py", ["a.py", "x/y/a.py"], ["a.pyc", "a.py.txt"]),
        ("/*.py", ["a.py"], ["x/a.py"]),
        ("**/*.py", ["a.py", "x/y/a.py"], ["a.js"]),
        ("src/", ["src/a.py", "x/src/y/a"], ["src"]),
        ("src/**/*.py", ["src/a.py", "src/x/y.py"], ["a.py", "x/src/a.py"]),
        ("src/*.py", ["src/a.py"], ["src/x/a.py", "x/src/a.py"]),
    ],
)
def test_globs_are_those_of_gitignore(pattern: str, takes: list[str], leaves: list[str]) -> None:
    patterns = Patterns([pattern])
    assert [name for name in takes + leaves if patterns.covers(name)] == takes


# --- what is left out, and why ----------------------------------------------------------------------------------------


def test_every_file_left_out_is_counted_by_its_reason(tmp_path: Path) -> None:
    tree = write(
        tmp_path / "tree",
        {
            "good.py": "x = 1\n", "deep/good.js": "x", ".github/good.sh": "echo",
            ".gitignore": "*.tmp.py\nbig/\n", "a.tmp.py": "x", "big/a.py": "x", "big/b.py": "x",
            "node_modules/m/index.js": "x", "deep/.venv/lib/site-packages/p.py": "x", "third_party/x.c": "x", "dist/a.js": "x", "p.egg-info/a.py": "x",
            "sub/.git": "gitdir: ../.git/modules/sub\n", "sub/a.py": "x",
            "a_pb2.py": "x", "lib.min.js": "x", "api.pb.go": "x",
            "gen.go": "// Code generated by protoc-gen-go. DO NOT EDIT.\npackage x\n", "gen.js": "/**\n * @generated SignedSource<<1>>\n */\nx\n",
            "gen.py": '#!/usr/bin/env python\n# This file was automatically generated by SWIG\nx = 1\n',
            "says.py": 'x = "Code generated by us. DO NOT EDIT"\nmail = "me@generated.org"\n',  # a text, no header: read
            "README.md": "text", "yarn.lock": "text", "data.json": "{}",
            "nul.py": b"x\0y", "latin.py": "# für\n".encode("latin-1"), "empty.py": "\n \n", "large.py": "x = 1\n" * 200_000, "skip/a.py": "x", "skip.py": "x",
        },
    )  # fmt: skip
    write(tmp_path, {"elsewhere/secret.py": "x"})
    (tree / "link.py").symlink_to(tmp_path / "elsewhere" / "secret.py")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "inside.py").symlink_to(tree / "good.py")
    os.mkfifo(tree / "pipe.py")
    selection = chosen(tree, exclude=("skip/", "/skip.py"))
    assert list(selection.files) == [".github/good.sh", "deep/good.js", "good.py", "says.py"]
    assert dict(selection.left_out) == {
        "ignored": 2, "vendored": 6, "generated": 6, "no programming language": 4, "link": 3, "no file": 1, "excluded": 2,
        "binary": 1, "not UTF-8": 1, "empty": 1, "over 1 MB": 1,
    }  # fmt: skip
    assert list(chosen(tree, include=("*.md", "*.json", "*.lock")).files) == ["README.md", "data.json"], "a lock file is generated"


def test_licenses(tmp_path: Path) -> None:
    tree = write(
        tmp_path / "tree",
        {
            "LICENSE": MIT, "a.py": "x", "deep/down/b.py": "x", "gpl.py": "# SPDX-License-Identifier: GPL-3.0-or-later\nx",
            "both.c": "/* SPDX-License-Identifier: GPL-2.0-only OR apache-2.0 */\nx",
            "isc/LICENSE.md": ISC, "isc/c.py": "x", "own/COPYING": "All rights reserved.", "own/d.py": "x", "two/LICENSE-MIT": MIT,
            "two/LICENSE-BSD": BSD, "two/e.rs": "x", "two/license.py": "x = 1\n",
        },
    )  # fmt: skip
    everything = chosen(tree)
    assert len(everything.files) == 8
    assert not {reason for reason in everything.left_out if "license" in reason}
    allowed = chosen(tree, licenses=("MIT", "Apache-2.0"))
    assert list(allowed.files) == ["a.py", "both.c", "deep/down/b.py"]
    refused = {reason: count for reason, count in allowed.left_out.items() if "license" in reason}
    assert refused == {"license GPL-3.0-or-later": 1, "license ISC": 1, "license unknown": 1, "license BSD-2-Clause": 2}
    (tree / "LICENSE").unlink()
    assert list(chosen(tree, licenses=("MIT",)).files) == [], "a file without any license is not allowed by a list"


def test_a_license_is_looked_for_up_to_the_top_of_the_repository(tmp_path: Path) -> None:
    write(tmp_path, {"LICENSE": ISC, "top/LICENSE": MIT, "top/package/a.py": "x"})
    assert list(chosen(tmp_path / "top" / "package", licenses=("MIT",)).files) == [], "no repository: nothing above is looked at"
    repository(tmp_path / "top")
    assert list(chosen(tmp_path / "top" / "package", licenses=("MIT",)).files) == ["a.py"]
    (tmp_path / "top" / "LICENSE").unlink()
    assert list(chosen(tmp_path / "top" / "package", licenses=("MIT", "ISC")).files) == []


def test_licenses_that_only_look_free() -> None:
    assert recognised(MIT) == ["MIT"]
    assert recognised(f'"Commons Clause" License Condition v1.0\n{MIT}') == []
    assert recognised(f"{BSD} 3. The name of the author may not be used to endorse or promote products.") == ["BSD-3-Clause"]
    assert recognised(BSD) == ["BSD-2-Clause"]


def test_an_ignored_folder_that_is_named_is_read(tmp_path: Path) -> None:
    top = repository(tmp_path / "top")
    write(
        top,
        {
            ".gitignore": "data/\n*.tmp.py\n",
            "data/corpus/a.py": "x",
            "data/corpus/.gitignore": "b.py\n",
            "data/corpus/b.py": "x",
            "src/a.tmp.py": "x",
            "src/c.py": "x",
        },
    )
    assert list(chosen(top / "data" / "corpus").files) == ["a.py"]
    assert list(chosen(top / "src").files) == ["c.py"]
    assert list(chosen(top).files) == ["src/c.py"]
    assert list(chosen(top, include=("./src/*.py",)).files) == ["src/c.py"]


def test_a_name_that_is_no_utf_8_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "tree", {"a.py": "x", "é.py": "x"})
    with open(os.fsencode(tmp_path / "tree") + b"/\xff.py", "wb") as file:
        file.write(b"x")
    selection = chosen(tmp_path / "tree")
    assert list(selection.files) == ["a.py", "é.py"]
    assert selection.left_out == {"name that is not UTF-8": 1}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True), ("mit", True), ("GPL-3.0-only", False), ("MIT OR GPL-3.0-only", True), ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False), ("MIT AND Apache-2.0", True), ("(MIT OR GPL-3.0-only) AND Apache-2.0", True),
        ("MIT OR GPL-3.0-only AND GPL-2.0-only", True), ("(MIT OR GPL-3.0-only) AND GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True), ("GPL-2.0-only WITH Classpath-exception-2.0", False), ("", False), ("(MIT", False), ("MIT MIT", False),
    ],
)  # fmt: skip
def test_license_expressions(expression: str, expected: bool) -> None:
    assert allows(expression, frozenset({"mit", "apache-2.0"})) is expected


def test_license_texts_that_are_really_about() -> None:
    """Compare with the packages installed here, whose metadata names the license of their text."""
    import importlib.metadata

    names = {
        "mit": "MIT",
        "apache-2.0": "Apache-2.0",
        "bsd-3-clause": "BSD-3-Clause",
        "mpl-2.0": "MPL-2.0",
        "isc": "ISC",
        "bsd-2-clause": "BSD-2-Clause",
    }
    compared = {}
    for distribution in importlib.metadata.distributions():
        said = (distribution.metadata.get("License-Expression") or "").lower()
        files = [
            file for file in distribution.files or [] if "dist-info" in str(file) and file.name.lower().startswith(("license", "licence"))
        ]
        if said in names and len(files) == 1:
            compared[distribution.name] = (recognised(files[0].read_text(encoding="utf-8")), [names[said]])
    assert len(compared) >= 20
    assert {name for name, (found, declared) in compared.items() if not set(declared) <= set(found)} <= {
        "jsonpointer"
    }  # its text has two clauses
    several = {name for name, (found, _) in compared.items() if len(found) > 1}
    assert len(several) <= 0.1 * len(compared), "a text that quotes other licenses names them all"


# --- the key ----------------------------------------------------------------------------------------------------------

PIPELINE = """version: 1
pipelines:
  p:
    stages:
      base: {kind: model, path: base}
      code: {kind: dataset, model: base, sources: [{type: code, path: tree}]}
"""


def test_only_files_that_are_read_enter_the_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "p.yaml": PIPELINE,
            "tree/a.py": "x",
            "tree/.gitignore": "out/\n",
            "tree/out/a.py": "x",
            "tree/b.min.js": "x",
            "tree/notes.md": "x",
        },
    )
    workspace = Workspace(load(tmp_path / "p.yaml"))
    stage = workspace.loaded.pipeline("p").stages["code"]
    assert isinstance(stage, ProgramStage)

    def found() -> ResolvedInputs:
        return resolve(workspace, stage, workspace.hub.commit)

    document = found().digests["sources.0.path"]
    assert found().files["sources.0.path"] == [str(tmp_path / "tree" / "a.py")]
    assert document == [{"name": "a.py", "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}]
    write(
        tmp_path,
        {
            "tree/out/a.py": "y",
            "tree/b.min.js": "y",
            "tree/notes.md": "y",
            "tree/.gitignore": "out\n# said otherwise\n",
            "tree/out/more.py": "x",
        },
    )
    assert found().digests["sources.0.path"] == document
    write(tmp_path, {"tree/a.py": "y"})
    assert found().digests["sources.0.path"] != document
    (tmp_path / "tree" / "a.py").rename(tmp_path / "tree" / "c.py")
    assert [entry["name"] for entry in found().digests["sources.0.path"]] == ["c.py"], "a file's name decides its split"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found no file at {root}/tree"),
        ({"tree": "x"}, "found a file at {root}/tree, expected a folder"),
        ({"tree/notes.md": "x", "tree/dist/a.js": "x"}, "found no file to read in {root}/tree; left out: 1 "),
    ],
)
def test_a_tree_without_source_is_said_in_the_plan(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    write(tmp_path, {"p.yaml": PIPELINE, "base/config.json": "{}", **files})
    row = plan(Workspace(load(tmp_path / "p.yaml")), "p")[1]
    assert row.status == "unknown"
    assert row.problems[0].message.startswith(message.format(root=tmp_path))
    assert row.problems[0].place.startswith(f"{tmp_path}/p.yaml:6:") or row.problems[0].place.startswith("p.yaml:6:")


def test_a_tree_behind_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"p/p.yaml": PIPELINE, "elsewhere/a.py": "x"})
    (tmp_path / "p" / "tree").symlink_to(tmp_path / "elsewhere")
    row = plan(Workspace(load(tmp_path / "p" / "p.yaml")), "p")[1]
    assert "found a link that leads out of the folder" in row.problems[0].message
