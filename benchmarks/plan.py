"""Measure `validate` and `plan`: on the demo, on a chain of 1,000 stages (compared with DVC), and on a source tree of 20,000 files.

    .venv/bin/python benchmarks/plan.py [--stages 1000] [--files 20000] [--rounds 3] [--dvc .cache/bench-dvc/bin/dvc]      (make bench-plan)

The chain: a base model, a dataset, and trainings that each go on from the adapter before; in dvc.yaml the same three
dependencies a stage. Cold: nothing is built. Built: every artifact is in the store (written and published as a run does it,
only without the hours of training) and in DVC's cache (`dvc commit`); `dvc repro --dry` is left out of the cold ones, as it
needs the files of earlier stages.

The tree: about 100 MB of Python in 1,000 folders, with 80 lines of .gitignore and an allow-list of licenses. Cold: nothing is
known of its files. Warm: a plan before has read them. Built: the dataset is in the store as well.

Each command is a process of its own, the commands by turns; the best of the rounds counts, since other work on the machine
only ever adds. CPU is user and system time, children included; files are read from the page cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


from table import add_row  # noqa: E402

from tuneline.canonical import key_of  # noqa: E402
from tuneline.config.load import load  # noqa: E402
from tuneline.config.order import in_order  # noqa: E402
from tuneline.config.spec import ProgramStage  # noqa: E402
from tuneline.planning.inputs import resolve  # noqa: E402
from tuneline.planning.plan import document_of  # noqa: E402
from tuneline.workspace.artifact import Artifact, Base, File, Manifest  # noqa: E402
from tuneline.workspace.history import input_slots  # noqa: E402
from tuneline.workspace.runs import StageRecord  # noqa: E402
from tuneline.workspace.workspace import Workspace  # noqa: E402

TUNELINE = (sys.executable, "-m", "flows")
IGNORED = (("cache", "/"), ("*.o", ""), ("local_settings", ".py"), ("/docs/_build", "/"))
FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")


def chain(folder: Path, stages: int) -> None:
    """Write pipelines.yaml and dvc.yaml with the same chain, and their two inputs."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    ours = ["version: 1", "pipelines:", "  chain:", "    stages:", "      base: {kind: model, path: model}"]
    ours.append("      data: {kind: dataset, model: base, sources: [{type: files, path: rows.jsonl}]}")
    theirs = ["stages:"]
    for name, inputs, source in (("base", ["model"], "model"), ("data", ["base", "rows.jsonl"], "base")):
        theirs += _dvc_stage(name, inputs, source)
    for i in range(stages - 2):
        adapter = f", adapter: s{i - 1}" if i else ""
        ours.append(f"      s{i}: {{kind: sft, model: base, dataset: data{adapter}, seed: {i}, max_steps: 100}}")
        theirs += _dvc_stage(f"s{i}", ["base", "data", *([f"s{i - 1}"] if i else [])], "base")
    (folder / "pipelines.yaml").write_text("\n".join(ours) + "\n")
    (folder / "dvc.yaml").write_text("\n".join(theirs) + "\n")


def tree(folder: Path, files: int) -> None:
    """Write a pipelines.yaml with one dataset, made of a source tree with that many files."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    for i in range(files):
        place = folder / "tree" / f"package{i // 1000}" / f"module{i // 20}"
        place.mkdir(parents=True, exist_ok=True)
        body = "".join(f"def function_{i}_{k}(values):\n    return [value for value in values if value]\n\n\n" for k in range(1 + i % 125))
        (place / f"file{i}.py").write_text(f'"""File {i}."""\n\n\n{body}')
    (folder / "tree" / "LICENSE").write_text("SPDX-License-Identifier: MIT\n")
    (folder / "tree" / ".gitignore").write_text("".join(f"{glob}{i}{end}\n" for i in range(20) for glob, end in IGNORED))
    lines = ["version: 1", "pipelines:", "  chain:", "    stages:", "      base: {kind: model, path: model}"]
    lines.append("      code: {kind: dataset, model: base, sources: [{type: code, path: tree, licenses: [MIT]}]}")
    (folder / "pipelines.yaml").write_text("\n".join(lines) + "\n")


def _dvc_stage(name: str, inputs: list[str], source: str) -> list[str]:
    command = f"cp -r {source} {name} && echo {name} > {name}/{FILES[0]}"
    return [f"  {name}:", f"    cmd: {command}", f"    deps: [{', '.join(inputs)}]", f"    outs: [{name}]"]


def build(folder: Path) -> None:
    """Publish every artifact of the chain to the store, and write a record of the run."""
    workspace = Workspace(load(folder / "pipelines.yaml"))
    pipeline = workspace.loaded.pipeline("chain")
    record = workspace.runs.begin("chain", ())
    artifacts: dict[str, Artifact] = {}
    for name in in_order(pipeline):
        stage = pipeline.stages[name]
        assert isinstance(stage, ProgramStage)
        inputs = {slot: artifacts[other] for slot, other in input_slots(stage).items()}
        document = document_of(stage, inputs, resolve(workspace, stage, workspace.hub.commit), pipeline)
        key = key_of(document)
        model = inputs["model"].manifest if stage.kind == "sft" else None
        base = Base(kind=model.kind, key=model.key, digest=model.digest, template=None) if model else None

        def manifest(digest: str, files: tuple[File, ...], stage=stage, key=key, document=document, inputs=inputs, base=base) -> Manifest:
            parents = {slot: f"{artifact.manifest.kind}/{artifact.key}" for slot, artifact in inputs.items()}
            return Manifest(
                kind=stage.kind, type=stage.output_type(),
                key=key, document=document, digest=digest, files=files, parents=parents, base=base,
                metrics={"loss": 1.0}, info={}, host={},
            )  # fmt: skip

        with workspace.store.locked(key):
            built = workspace.store.staging_dir(key)
            (built / "meta").mkdir()
            (built / "payload").mkdir()
            for file in FILES:
                (built / "payload" / file).write_text(f"{name} {file}")
            artifacts[name] = artifact = workspace.store.publish(built, manifest)
        fields = {"key": key, "digest": artifact.digest, "document": document, "artifact": str(artifact.path)}
        record.stages.append(StageRecord(stage=name, kind=stage.kind, status="done", **fields))
    workspace.runs.finish(record, "completed")


def build_dvc(folder: Path, dvc: str) -> None:
    """Run the commands of dvc.yaml, and commit their outputs to DVC's cache."""
    for stage in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"].values():
        subprocess.run(stage["cmd"], shell=True, cwd=folder, check=True)
    cost((dvc, "commit", "--force", "--quiet"), folder)


def cost(command: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Return (CPU seconds, seconds) of a process and its children."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def table(
    title: str,
    commands: list[tuple[str, tuple[str, ...]]],
    folder: Path,
    rounds: int,
    peer: str | None,
    forget: Path | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the best of the rounds by name. Removes `forget` before each command."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, command in commands:
            if forget:
                forget.unlink(missing_ok=True)
            best[name] = min(cost(command, folder), best.get(name, (float("inf"), 0.0)))
    print(f"\n{title}, best of {rounds}\n{'command':<24}{'CPU s':>8}{'wall s':>8}" + (f"{'of ' + peer:>16}" if peer else ""))
    for name, (cpu, seconds) in best.items():
        print(f"{name:<24}{cpu:>8.2f}{seconds:>8.2f}" + (f"{cpu / best[peer][0]:>16.2f}" if peer else ""), flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=1000)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dvc", type=Path, help="its command, in an environment of its own; without it tuneline is measured alone")
    parser.add_argument("--rows", type=Path, help="file that the rows of the common table are appended to")
    arguments = parser.parse_args()

    def keep(title: str, best: dict[str, tuple[float, float]], *pairs: tuple[str, str], limit: float = 1.0) -> None:
        for ours, theirs in pairs:
            add_row(
                arguments.rows, f"`{ours}`, {title}: CPU", best[ours][0], theirs, best[theirs][0] if theirs in best else limit, "s", 1.0
            )

    ours = [(f"tuneline {what}", (*TUNELINE, *what.split())) for what in ("validate", "plan demo")]
    keep("the demo", table("The demo", ours, ROOT, arguments.rounds, None), *((name, "limit") for name, _ in ours))
    validate, plan = ("tuneline validate", (*TUNELINE, "validate")), ("tuneline plan", (*TUNELINE, "plan", "chain"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree(folder, arguments.files)
        size = f"a tree of {arguments.files} files"
        for state, limit in (("cold", 3.0), ("warm", 1.0), ("built", 1.0)):
            if state == "built":
                build(folder)
            forget = folder / ".tuneline" / "digests.json" if state == "cold" else None
            best = table(f"{size}, {state}", [plan], folder, arguments.rounds, None, forget)
            keep(f"{size}, {state}", best, (plan[0], "limit"), limit=limit)
    run, show = (("tuneline " + name, (*TUNELINE, name, "chain")) for name in ("run", "show"))
    dvc = str(arguments.dvc.absolute()) if arguments.dvc else ""
    status, dry, repro = (("dvc " + name, (dvc, *name.split())) for name in ("status", "repro --dry", "repro"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chain(folder, arguments.stages)
        if dvc:
            subprocess.run([dvc, "init", "--no-scm", "--quiet"], cwd=folder, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
        peer, size = "dvc status" if dvc else None, f"{arguments.stages} stages"
        best = table(f"{size}, cold", [validate, plan, *([status] if dvc else [])], folder, arguments.rounds, peer)
        if dvc:
            keep(f"{size}, cold", best, (plan[0], status[0]))
        build(folder)
        if dvc:
            build_dvc(folder, dvc)
        commands = [plan, run, show, *([status, dry, repro] if dvc else [])]
        best = table(f"{size}, built", commands, folder, arguments.rounds, peer)
        if dvc:
            keep(f"{size}, built", best, (plan[0], status[0]), (run[0], repro[0]))
        (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
        best = table(f"{size}, the data edited", [plan, *([status, dry] if dvc else [])], folder, arguments.rounds, peer)
        if dvc:
            keep(f"{size}, data edited", best, (plan[0], status[0]))


if __name__ == "__main__":
    main()
