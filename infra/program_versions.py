"""Keeps tasks/versions.json true: kind -> VERSION (in every key) and a digest of the program's code.

    python infra/program_versions.py --check          fails where code moved and nobody said what that means (make lint)
    python infra/program_versions.py --raise sft      the output changes: artifacts of this kind are made anew
    python infra/program_versions.py --same sft       the output stays the same (a message, a comment in code, a speed-up)

The digest covers the syntax tree of the program and of every module of `tasks` that it imports, without docstrings, comments
and layout, so that only code counts.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "tasks" / "versions.json"


def programs() -> dict[str, str]:
    """PROGRAMS of tasks/__main__.py, read without importing it."""
    for node in ast.parse((ROOT / "tasks" / "__main__.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "PROGRAMS":
            return dict(ast.literal_eval(node.value))
    raise SystemExit("tasks/__main__.py has no PROGRAMS")


def modules_of(program: str) -> list[Path]:
    """The program's file and those of `tasks` that it imports, near and far."""
    found: set[Path] = set()
    waiting = [program]
    while waiting:
        path = ROOT / (waiting.pop().replace(".", "/") + ".py")
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tasks"):
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found)


def code_digest(program: str) -> str:
    digest = hashlib.sha256()
    for path in modules_of(program):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.relative_to(ROOT)}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def main(arguments: list[str]) -> int:
    known = json.loads(VERSIONS.read_text())
    now = {kind: code_digest(module) for kind, module in programs().items()}
    if arguments == ["--check"]:
        moved = [kind for kind, digest in now.items() if known.get(kind, {}).get("source") != digest]
        for kind in moved:
            print(f"the code of `{kind}` has changed; say what that means for its output:")
            print(f"    python infra/program_versions.py --raise {kind}    other output: its artifacts are made anew")
            print(f"    python infra/program_versions.py --same {kind}     the same output: they stay valid")
        return 1 if moved or known.keys() != now.keys() else 0
    if len(arguments) < 2 or arguments[0] not in ("--raise", "--same"):
        raise SystemExit(__doc__)
    for kind in now if arguments[1:] == ["all"] else arguments[1:]:
        before = known.get(kind, {"version": 0 if arguments[0] == "--raise" else 1})
        known[kind] = {"version": before["version"] + (arguments[0] == "--raise"), "source": now[kind]}
    VERSIONS.write_text(json.dumps({kind: known[kind] for kind in now if kind in known}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
