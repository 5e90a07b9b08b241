"""Implements the methods of sft: each loads the base in its own way, and `full` saves every weight.

    lora   the base unchanged, frozen
    qlora  the base in 4 or 8 bits, frozen, by bitsandbytes (arXiv:2305.14314); its adapter fits the base in full precision
    full   the base in float32, whatever the compute dtype: most steps are too small to change a weight in bfloat16

A full model is saved in its base's form: the same files, names and types with the trained values, so tied weights stay tied. Left
out: architectures whose names in transformers differ from those in their files (it would resume from the base's weights instead of the
checkpoint's, with only a warning).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.loading import compute_type, device
from tasks.models.weights import INDEX, read_header, weight_files
from tuneline.errors import StageFailed
from tuneline.kinds.sft import AnswerTraining
from tuneline.patches import patch
from tuneline.workspace.protocol import Input
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


def load_base(base: Input, stage: AnswerTraining) -> PreTrainedModel:
    """Load the model to train, or to add an adapter to. Raises StageFailed(config) if the method does not support it, or not here."""
    import torch

    from tasks.training import strategies

    dtype = compute_type(stage)
    if stage.method == "lora":
        return strategies.load_base(base, stage, dtype)
    if "quantization_config" in json.loads((model_folder(base.path) / "config.json").read_text(encoding="utf-8")):
        hint = "name the model that it was made from, or set `method: lora`"
        raise StageFailed("config", f"method: {stage.method}: found a base that is quantized, expected one in full precision", hint)
    if stage.method == "full":
        model = strategies.load_base(base, stage, torch.float32)
        check_names(model, base)
        return model
    check_bits(stage.bits, dtype)
    model = strategies.load_base(base, stage, dtype, quantization(stage.bits, dtype))
    if not any(isinstance(module, torch.nn.Linear) and type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        message = f"method: qlora: found no layer that bitsandbytes quantizes in a model of type {model.config.model_type}"
        raise StageFailed("config", message, "set `method: lora`: nothing would be saved")
    keep_differentiable(model)
    return model


# --- qlora ------------------------------------------------------------------------------------------------------------


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration for 4 bits as in the paper (normal floats with quantized scales), or for 8 bits."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def keep_differentiable(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from packing 4-bit weights for inference, as it does at the first evaluation on a CPU with AVX512-BF16: its
    kernel for packed weights has no gradient, so the layers below would get only a part of theirs (0.50.2, Linear4bit)."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            patch(module, "support_avx512bf16_for_cpu", False)


def check_bits(bits: int, dtype: torch.dtype) -> None:
    """Raises StageFailed(config) unless a quantized layer on this device gives about the output and gradient of full precision.
    It is tried, because bitsandbytes' support depends on device, driver and build.
    """
    try:
        wrong = errors_of_few_bits(bits, dtype)
        problem = f"is off by {max(wrong):.0%}" if max(wrong) > 0.3 else ""  # 4 bits round by a tenth, 8 bits by less than a hundredth
    except Exception as error:  # its import, its C library or CUDA raise any type
        problem = f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if problem:
        # docs/source/installation.mdx of bitsandbytes
        hint = "set `method: lora`, or run it on a CPU, or on a GPU of compute capability 6.0 or more (7.5 for 8 bits)"
        raise StageFailed("config", f"method: qlora: a layer of {bits} bits on {device()} {problem}", hint)


def errors_of_few_bits(bits: int, dtype: torch.dtype, width: int = 64) -> list[float]:
    """Return the relative errors of a small quantized layer's outputs and gradients, compared with full precision."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(width, width, generator=generator), torch.randn(8, width, generator=generator)
    layer: Any = (
        Linear4bit(width, width, bias=False, compute_dtype=dtype, quant_type="nf4")
        if bits == 4
        else Linear8bitLt(width, width, bias=False, has_fp16_weights=False)
    )
    layer.weight.data = weight.clone()
    keep_differentiable(layer.to(device()))
    given = rows.clone().to(device(), dtype).requires_grad_()
    with torch.no_grad():
        layer.eval()(given.detach())  # trainings evaluate in between
    found = layer.train()(given)
    found.backward(given.detach())
    assert given.grad is not None
    pairs = ((found, rows @ weight.T), (given.grad, rows @ weight))
    return [float((one.detach().float().cpu() - other).norm() / other.norm()) for one, other in pairs]


def adapter_in_float32(model: PeftModel, earlier: Input | None) -> None:
    """Undo TRL's cast of adapters on quantized bases to bfloat16, and train modules in float32 that PEFT copied in the base's type: in
    bfloat16 small steps would be lost, and an earlier adapter's last digits."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if earlier:
        set_peft_model_state_dict(model, load_file(earlier.path / "adapter_model.safetensors"))


# --- full -------------------------------------------------------------------------------------------------------------


def check_names(model: PreTrainedModel, base: Input) -> None:
    """Raises StageFailed(config) unless every weight has its name in the base's files, or is tied to one that has."""
    stored = {name for file in weight_files(model_folder(base.path)) for name in read_header(file)}
    named = dict(model.named_parameters(remove_duplicate=False))
    held = {id(named[name]) for name in stored & named.keys()}
    if lost := sorted(name for name, parameter in named.items() if id(parameter) not in held):
        message = f"method: full: found {len(lost)} weights that transformers renames, the first {lost[0]}"
        raise StageFailed("config", message, "train an adapter: `method: lora`")


def parameters(model: PreTrainedModel) -> int:
    """Return the number of weights, also where ZeRO-3 has split them."""
    return sum(each.ds_numel if hasattr(each, "ds_numel") else each.numel() for each in model.parameters())


def weights(model: PreTrainedModel, keep: bool) -> dict[str, torch.Tensor]:
    """Return copies of all weights, whole and on the CPU, by name. Every process must call it; only the first needs to keep them."""
    from tasks.training import strategies

    kept = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = strategies.whole(parameter)
        if keep:
            kept[strategies.unwrapped(name)] = tensor
    return kept


def weights_in(checkpoint: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, whose files hold one of each group of tied weights."""
    from safetensors.torch import load_file

    saved = {name: tensor for file in weight_files(checkpoint) for name, tensor in load_file(file).items()}
    named = dict(model.named_parameters(remove_duplicate=False))
    by_parameter = {id(parameter): saved[name] for name, parameter in named.items() if name in saved}
    return {name: by_parameter[id(parameter)] for name, parameter in named.items()}


def save_model(trained: dict[str, torch.Tensor], base: Input, payload: Path) -> None:
    """Write the base's weight files with the trained values."""
    import torch
    from safetensors.torch import load_file, save_file

    folder, written = model_folder(base.path), set[str]()
    for file in weight_files(folder):
        tensors = load_file(file)
        for name in tensors.keys() & trained.keys():  # tensors that transformers does not read stay unchanged
            tensors[name] = trained[name].to(tensors[name].dtype, copy=True)
            written.add(name)
        save_file(tensors, payload / file.name, metadata={"format": "pt"})
    for name in sorted(trained.keys() - written):  # tied to a written one, or renamed by a wrapper
        if not any(torch.equal(trained[name], trained[other]) for other in written):
            raise StageFailed("bug", f"{name} of the model has no place in the base's files")
    if (folder / INDEX).exists():
        shutil.copyfile(folder / INDEX, payload / INDEX)


def check_model(payload: Path, base: Input) -> None:
    """Raises StageFailed unless the saved model is complete, finite, of the base's shapes and types, and changed by the training."""
    import torch
    from safetensors.torch import load_file

    changed = 0
    for file in weight_files(model_folder(base.path)):
        before, after = load_file(file), load_file(payload / file.name)
        if lost := sorted(before.keys() ^ after.keys()):
            raise StageFailed("bug", f"{file.name} of the model has {len(lost)} missing or additional tensors, the first {lost[0]}")
        for name, tensor in after.items():
            found, wanted = (f"{one.dtype} {list(one.shape)}" for one in (tensor, before[name]))
            if found != wanted:
                raise StageFailed("bug", f"{name} of the model: found {found}, expected {wanted}, as in the base")
            if not torch.isfinite(tensor).all():
                raise StageFailed("data", f"{name} of the model is not finite", "lower learning_rate")
            changed += not torch.equal(tensor, before[name])
    if not changed:
        raise StageFailed(
            "data", "the training changed nothing: every weight has its initial value", "raise learning_rate, or train for more steps"
        )
