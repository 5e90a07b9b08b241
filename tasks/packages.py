"""What a program imports, which is most of the time that it takes on a small model: nothing large that its stage does not use, and
all at once.

PEFT, transformers, accelerate and gptqmodel import what they find installed, used or not: up to a third of a program's CPU time on a
small model. A hidden package is not installed for them: `importlib.util.find_spec` gives None, and an import raises
ModuleNotFoundError, which `tasks.__main__` explains. None in `sys.modules` does both (docs.python.org/3/reference/import.html,
"The module cache").
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType

from tasks.models.gptq import quantization
from tasks.models.loading import needs_remote_code
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.grpo import GrpoStage
from tuneline.kinds.model import ModelStage
from tuneline.kinds.quantize import QuantizeStage
from tuneline.kinds.rewards import FunctionReward
from tuneline.kinds.sft import SftStage
from tuneline.kinds.stage import ProgramStage
from tuneline.workspace.protocol import Input, Request
from tuneline.workspace.reference import folder_of as model_folder

LARGE = ("bitsandbytes", "deepspeed", "gptqmodel", "torch", "torchao")
LAYERS = "transformers.modeling_layers"  # which imports what all models are made of
IMPORTS = {  # by kind: the modules whose imports are nearly all of what the program imports in any case
    "model": (LAYERS,),
    "sft": ("tasks.training.checkpoints", "tasks.training.sft_trainer"),
    "grpo": ("tasks.training.checkpoints", "tasks.training.grpo_trainer"),
    "evaluate": ("tasks.evaluation.harness", LAYERS),
    "merge": ("peft",),
    "quantize": (LAYERS,),
}


def hide(request: Request) -> None:
    """Must be called before any library is imported; what is there already stays."""
    for name in set(LARGE) - needed(request):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def hidden() -> list[str]:
    return [name for name in LARGE if sys.modules.get(name, sys) is None]


def needed(request: Request) -> set[str]:
    """What the stage may import; all of them where code of a model or of a user runs, which may import anything."""
    stage = request.stage()
    models = [given.base or given for given in request.inputs.values() if given.type in ("Model", "Adapter")]
    methods = {(quantization(model_folder(model.path)) or {}).get("quant_method", "none") for model in models}
    if runs_own_code(stage, models) or methods - {"none", "gptq"}:
        return set(LARGE)
    found = set() if isinstance(stage, DatasetStage) else {"torch"}  # a tokenizer needs none
    if isinstance(stage, QuantizeStage):
        found.add("gptqmodel")
    if isinstance(stage, SftStage) and stage.method == "qlora":
        found.add("bitsandbytes")
    if stage.resources.strategy.startswith("zero") or stage.resources.sequence_parallel_size > 1:
        found.add("deepspeed")
    return found


def runs_own_code(stage: ProgramStage, models: list[Input]) -> bool:
    return (
        any(needs_remote_code(model) for model in models)
        or (isinstance(stage, ModelStage) and stage.trust_remote_code)
        or (isinstance(stage, GrpoStage) and any(isinstance(reward, FunctionReward) for reward in stage.rewards))
        or (isinstance(stage, EvaluateStage) and stage.include_path is not None)
    )


def import_program(kind: str, name: str) -> ModuleType:
    """The module `name`, imported with the libraries of its kind. The garbage collector waits, and never looks at them later: it would
    walk through half a million objects that stay anyway, again and again, for a sixth of the program's CPU time."""
    gc.disable()
    for module in (name, *IMPORTS.get(kind, ())):
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    return sys.modules[name]
