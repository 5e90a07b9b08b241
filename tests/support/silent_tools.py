"""What the tests of silent faults share: a small world of real artifacts in a store, and `tasks.__main__` run on it as the orchestrator does."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pico import save_pico
from program_tools import make_request
from safetensors.torch import load_file, save_file

import tasks.__main__ as program
from tuneline.workspace.artifact import Artifact, Manifest
from tuneline.workspace.protocol import Failure, Input, Result
from tuneline.workspace.store import Store

CONFIGS: dict[str, dict[str, Any]] = {
    "model": {"path": "model"},
    "dataset": {"model": "base", "sources": [{"type": "files", "path": "data.jsonl"}], "split": {"validation": 0.15, "test": 0.2}},
    "sft": {
        "model": "base", "dataset": "data", "max_steps": 30, "global_batch_size": 4, "learning_rate": 2e-2, "lora": {"r": 4, "lora_alpha": 8},
    },
    "merge": {"adapters": ["sft"]},
    "evaluate": {"model": "sft", "datasets": ["data"], "max_new_tokens": 4, "limit": 4},
    "quantize": {"model": "merged", "calibration": "data", "samples": 8, "group_size": 32, "max_perplexity_ratio": 3},
}  # fmt: skip
TYPES = {"model": "Model", "dataset": "Dataset", "sft": "Adapter", "merge": "Model"}


@dataclass
class World:
    """Artifacts in a store, by kind, and what a request says of them."""

    store: Store
    data: Path
    artifacts: dict[str, Artifact]

    def input(self, kind: str) -> Input:
        artifact = self.artifacts[kind]
        base = self.input("model") if kind == "sft" else None
        manifest = artifact.manifest
        return Input(path=artifact.payload, digest=manifest.digest, type=manifest.type, template=manifest.template, base=base)

    def inputs(self, kind: str) -> dict[str, Input]:
        wanted = {
            "dataset": {"model": "model"}, "sft": {"model": "model", "dataset": "dataset"}, "merge": {"adapters.0": "sft"},
            "evaluate": {"model": "sft", "datasets.0": "dataset"}, "quantize": {"model": "merge", "calibration": "dataset"},
        }  # fmt: skip
        return {slot: self.input(other) for slot, other in wanted.get(kind, {}).items()}

    def run(self, folder: Path, kind: str, **fields: Any) -> Result | Failure:
        """Runs the program as the orchestrator does, but in this process."""
        files = fields.pop("files", {}) | {
            "path": [self.data.parent / "pico"],
            "sources.0.path": [self.data],
            "sources.1.path": [self.data.parent / "longer.jsonl"],
        }
        inputs = fields.pop("inputs", None) or self.inputs(kind)
        request = make_request(folder, {"kind": kind, **CONFIGS[kind], **fields}, inputs, files=files)
        request.write(request.work / "request.json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tasks", str(request.work / "request.json")])
            patch.setattr(program, "hide", lambda request: None)  # the next stage may need it, in this process
            status = program.main()
        found: Result | Failure = (Failure.read if status else Result.read)(request.work / ("failure.json" if status else "result.json"))
        return found

    def publish(self, built: Path, kind: str, result: Result) -> Artifact:
        def manifest(payload_digest: str, files: Any) -> Manifest:
            return Manifest.model_validate(
                {
                    "kind": kind, "type": TYPES[kind], "key": payload_digest, "document": {}, "digest": payload_digest, "files": files,
                    "parents": {}, "template": result.info.get("template"), "metrics": result.metrics, "info": {}, "host": {},
                }
            )  # fmt: skip

        return self.store.publish(built, manifest)

    def copy(self, folder: Path) -> World:
        """Artifacts of its own, with their times, to be tampered with."""
        shutil.copytree(self.store.root, folder)
        moved = {kind: Artifact(folder / a.path.relative_to(self.store.root), a.manifest) for kind, a in self.artifacts.items()}
        return World(Store(folder), self.data, moved)


def make_world(folder: Path) -> World:
    """A dataset, an adapter that was trained on it, and the model merged from both, each by its program."""
    save_pico(folder / "pico")
    rows = [{"prompt": f"{i} + {i % 7}?", "completion": f"It is {i + i % 7}, of course."} for i in range(60)]
    for name, more in (("data", []), ("longer", chat("And twice that?", "Let me see.")["messages"])):
        text = "".join(json.dumps({"messages": chat(**row)["messages"] + more}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    made = World(Store(folder / "store"), folder / "data.jsonl", {})
    for kind in ("model", "dataset", "sft", "merge"):
        result = made.run(folder / kind, kind)
        assert isinstance(result, Result), result
        if kind == "model":  # copied, where the program refers to it: the store's own files are what is tampered with
            shutil.rmtree(folder / kind / "out" / "payload")
            shutil.copytree(folder / "pico", folder / kind / "out" / "payload")
        made.artifacts[kind] = made.publish(folder / kind / "out", kind, result)
    return made


def chat(prompt: str, completion: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


def edit_weights(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(found: Result | Failure, message: str) -> None:
    assert isinstance(found, Failure), "nothing was noticed"
    text = f"{found.failure_class}: {found.message}"
    assert re.match(message, text), text
