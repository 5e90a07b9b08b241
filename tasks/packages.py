"""Limits and speeds up a program's imports, which are most of its time on a small model: it imports no large package that its stage does
not use, and the rest in one go.

PEFT, transformers, accelerate and gptqmodel import what they find installed, used or not: up to a third of a program's CPU time on a
small model. A hidden package seems not installed: `importlib.util.find_spec` returns None, and an import raises ModuleNotFoundError,
which `tasks.__main__` explains. None in `sys.modules` does both (docs.python.org/3/reference/import.html, "The module cache").
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType

from tasks.models.gptq import quantization
from tasks.models.loading import needs_remote_code
from tuneline.kinds.stage import ProgramStage
from tuneline.workspace.protocol import Request
from tuneline.workspace.reference import folder_of as model_folder

LARGE = ("bitsandbytes", "deepspeed", "gptqmodel", "torch", "torchao")


def hide(request: Request) -> None:
    """Hide the packages. Must be called before any library is imported: loaded packages stay."""
    for name in set(LARGE) - needed(request):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def hidden() -> list[str]:
    return [name for name in LARGE if sys.modules.get(name, sys) is None]


def needed(request: Request) -> set[str]:
    """Return the packages that the stage may import: all of them if a model's or user's code runs, which may import anything."""
    stage = request.stage()
    models = [given.base or given for given in request.inputs.values() if given.type in ("Model", "Adapter")]
    methods = {(quantization(model_folder(model.path)) or {}).get("quant_method", "none") for model in models}
    if stage.runs_user_code() or any(needs_remote_code(model) for model in models) or methods - {"none", "gptq"}:
        return set(LARGE)
    return set(stage.packages())


def import_program(stage: type[ProgramStage]) -> ModuleType:
    """Import the program of a kind, and the modules that it names. Pauses the garbage collector and freezes the imported objects: it would
    traverse half a million permanent objects again and again, for a sixth of the program's CPU time."""
    gc.disable()
    for module in (stage.program, *stage.imports):
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    return sys.modules[stage.program]
