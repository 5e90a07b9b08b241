"""The libraries in keys are those that programs import, in any function of any helper in `tasks`."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneline.config.spec import PROGRAM_STAGES
from tuneline.kinds.training import BITSANDBYTES_LIBRARIES
from tuneline.workspace.runtimes import _locked

ROOT = Path(__file__).resolve().parents[2]
LOCKS = "".join((ROOT / "infra" / "runtimes" / f"{name}.txt").read_text() for name in ("torch", "quantize"))
PINS = set(re.findall(r"^([a-z0-9-]+)==", LOCKS, re.MULTILINE))
TRACKERS = {"mlflow", "trackio", "wandb"}  # in no lock, and without effect on a result
NOT_OF_A_PROGRAM = sys.stdlib_module_names | {"tasks", "tuneline"} | TRACKERS
LIBRARIES = {kind: stage.libraries for kind, stage in PROGRAM_STAGES.items()}
ALL = tuple(LIBRARIES)
# Imported libraries whose version cannot affect the output: library -> kinds and the reason.
CHANGES_NOTHING: dict[str, tuple[tuple[str, ...], str]] = {
    "charset-normalizer": (("dataset",), "names the encoding of a file in the hint of an error"),
    "deepspeed": (("sft", "dpo", "kto", "grpo"), "how devices share a training changes nothing but rounding: strategies are in no key"),
    "bitsandbytes": (("grpo",), "its helpers are those of sft, whose qlora uses it; its optimizers put it into the key"),
    "httpx2": (("grpo", "evaluate", "model", "dataset", "quantize", "export"), "carries requests to vLLM on this machine, and to the hub"),
    "huggingface-hub": (("quantize", "dataset"), "says where its cache is, and reads licenses; downloads are the model's stage"),
    "jinja2": (ALL, "names arguments and errors of a template; transformers renders"),
    "logbar": (("quantize",), "kept quiet"),
    "matplotlib": (("dataset",), "draws pictures for people into meta/"),
    "numpy": (ALL, "takes the bits of GPTQ weights apart, exactly"),
    "peft": (("model", "dataset", "quantize"), "loads adapters, which these kinds are not given"),
    "pyarrow": (
        ("sft", "dpo", "kto", "grpo", "evaluate", "merge", "quantize", "export"),
        "reads the rows that a dataset stage wrote, exactly",
    ),
    "safetensors": (("dataset", "evaluate"), "reads tensors, exactly"),
    "tensorboardx": (("sft", "dpo", "kto", "grpo"), "writes event files beside the artifact"),
    "torch": (("dataset",), "loads weights, of which a dataset needs none"),
}


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "infra" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported(node: ast.AST) -> Iterator[str]:
    """Return the modules imported at run time, without those under TYPE_CHECKING."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.module
        assert not node.level
        yield node.module
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def libraries_of(module: Path) -> set[str]:
    """Return the distributions that a file of `tasks` imports. If it imports dynamically, any library named in a string counts."""
    tree = ast.parse(module.read_text())
    names = set(imported(tree))
    if "import_module" in {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}:
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        names |= {text for text in texts if text.isidentifier() and text.replace("_", "-") in PINS}
    return {top.replace("_", "-").lower() for name in names if (top := name.partition(".")[0]) not in NOT_OF_A_PROGRAM}


def unnamed(named: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Return, by kind, the imported libraries that are neither in `named` nor in CHANGES_NOTHING."""
    versions, found = script("program_versions"), {}
    for kind, program in versions.programs().items():
        used = set().union(*map(libraries_of, versions.modules_of(program)))
        assert used <= PINS, "a library is imported by another name than its distribution has"
        excused = {library for library, (kinds, _) in CHANGES_NOTHING.items() if kind in kinds}
        assert excused <= used - set(named[kind]), "CHANGES_NOTHING has a library that is not imported, or is in the key anyway"
        found[kind] = used - set(named[kind]) - excused
    return {kind: libraries for kind, libraries in found.items() if libraries}


def test_what_programs_import_is_in_their_keys() -> None:
    named = LIBRARIES | {kind: LIBRARIES[kind] + BITSANDBYTES_LIBRARIES for kind in ("sft", "dpo", "kto")}
    assert unnamed(named) == {}
    forgotten = {"merge": "huggingface-hub", "dataset": "tree-sitter-go", "grpo": "math-verify"}
    without = {kind: tuple(library for library in libraries if library != forgotten.get(kind)) for kind, libraries in named.items()}
    assert unnamed(without) == {kind: {library} for kind, library in forgotten.items()}


def test_of_a_lock_for_many_machines_the_lines_of_this_one_count(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text(
        "pyarrow==26.0.1 ; python_version >= '3.11'\npyarrow==14.0.2 ; python_version < '3.11'  # older\n"
        "numpy==2.0.0 ; sys_platform == 'linux' \\\n    --hash=sha256:00\nnumpy==1.0.0 ; sys_platform == 'win32'\nuv==1.0  # via us\n"
    )
    assert _locked(tmp_path / "lock.txt") == {"pyarrow": "26.0.1", "numpy": "2.0.0", "uv": "1.0"}
