"""Reads a GPTQ model without its kernels: packed weights are decoded once, into ordinary linear layers.

So gptqmodel, which pins other libraries, is in the runtime of `quantize` alone. On a CPU its kernels are over 10 times slower than the
dense model. The values are the same as the kernels': (code - zero) * scale, rounded to the scale's type. This needs the memory of an
unquantized model; an evaluation with `backend: vllm` uses kernels that compute with packed weights.

Left out: layouts other than `gptq` and `gptq_v2`, and layers padded because their width is no multiple of 32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.weights import weight_files
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

FORMATS = ("gptq", "gptq_v2")


def quantization(folder: Path) -> dict[str, Any] | None:
    """Return `quantization_config` of the model's config.json; None if the model is not quantized."""
    found: dict[str, Any] | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return found


def is_gptq(folder: Path) -> bool:
    return (quantization(folder) or {}).get("quant_method") == "gptq"


def load_dense(folder: Path, dtype: torch.dtype, device_map: str | None = None) -> PreTrainedModel:
    """Load the GPTQ model in `folder`, decoded to `dtype`, on the CPU or by the device map `device_map`."""
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    settings = config.quantization_config
    del config.quantization_config
    layout = settings.get("checkpoint_format", "gptq")
    if layout not in FORMATS:
        raise StageFailed("data", f"cannot decode GPTQ weights of format {layout}", f"expected one of {', '.join(FORMATS)}")
    state = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    turned = transposed(config)
    for name in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        packed = {part: state.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = decode(**packed, bits=settings["bits"], zeros_less_one=layout == "gptq")
        state[f"{name}.weight"] = weight.t().contiguous() if name in turned else weight
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # AutoModelForCausalLM needs a folder; only the model classes themselves accept a state dict without one.
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map=device_map, output_loading_info=True
    )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])})
    if wrong:
        raise StageFailed("data", f"the quantized weights do not fit their config.json: {len(wrong)} tensors, first {wrong[0]}")
    return model.eval()


def transposed(config: PreTrainedConfig) -> set[str]:
    """Return the layers whose weight is stored as (inputs, outputs): GPT-2's Conv1D."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def cosines(source: Path, payload: Path, layers: Iterable[str], prefix: str = "", outputs: int = 64) -> Iterator[tuple[str, float]]:
    """Yield each quantized layer's name, and the cosine between its first outputs' decoded weights and those of the source.

    Reads only these slices, so a large model needs no more memory than a small one. GPT-2's weights are stored transposed. The
    names in the source's files lack `prefix`.
    """
    from torch.nn.functional import cosine_similarity

    settings = quantization(payload) or {}
    before, after = slices(source), slices(payload)
    for name in layers:
        if f"{name}.qweight" not in after:
            continue
        found = decode(
            after[f"{name}.qweight"][:, :outputs],
            after[f"{name}.qzeros"][:, : outputs * settings["bits"] // 32],
            after[f"{name}.scales"][:, :outputs],
            after[f"{name}.g_idx"][:],
            bits=settings["bits"],
            zeros_less_one=settings.get("checkpoint_format", "gptq") == "gptq",
        )
        weight = before[f"{name}.weight".removeprefix(prefix)]
        wanted = [rows for rows in (weight[:outputs], weight[:, :outputs].t()) if rows.shape == found.shape]
        yield name, max(float(cosine_similarity(found.float().flatten(), rows.float().flatten(), dim=0)) for rows in wanted)


def slices(folder: Path) -> dict[str, Any]:
    """Map each tensor's name in a model folder to a slice, of which parts can be read."""
    from safetensors import safe_open

    files = [safe_open(file, "pt") for file in weight_files(folder)]
    return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118


def decode(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, bits: int, zeros_less_one: bool
) -> torch.Tensor:
    """Return a linear layer's weight, (outputs, inputs).

    qweight (inputs * bits / 32, outputs) and qzeros (groups, outputs * bits / 32) hold codes in int32 words, scales are
    (groups, outputs), and g_idx names the group of each input.
    """
    import torch

    # The format `gptq` stores each zero minus one. With 2, 4 and 8 bits it was subtracted from whole words, where a zero of 0
    # borrows from its neighbor, so it is added to whole words again; with 3 bits, where codes cross words, to each code.
    if zeros_less_one and bits != 3:
        qzeros = qzeros + torch.tensor(sum(1 << shift for shift in range(0, 32, bits)), dtype=torch.int32)
    zeros = unpack(qzeros, bits)
    if zeros_less_one and bits == 3:
        zeros = (zeros + 1) % 2**bits
    codes = unpack(qweight.t().contiguous(), bits).t()
    groups = g_idx.long()
    return (scales.float()[groups] * (codes - zeros[groups])).to(scales.dtype).t().contiguous()


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Decode rows of int32 words into codes: a row is one stream of bits, lowest bit first."""
    import numpy
    import torch

    stream = numpy.unpackbits(words.numpy().view(numpy.uint8), axis=1, bitorder="little")
    codes = numpy.packbits(stream.reshape(len(words), -1, bits), axis=2, bitorder="little")[:, :, 0]
    return torch.from_numpy(codes).to(torch.int16)
