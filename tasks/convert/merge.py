"""Folds a LoRA adapter into its base: reads the base's safetensors shards and writes the model's, one block of rows at a time.

Plain LoRA, rsLoRA and DoRA change each row of a weight independently, so neither the model nor even a whole tensor is ever in
memory. The files are read and written here (a length, a JSON header and the bytes), because safetensors' own `save_file` needs
every tensor of a file at once. Sums are computed in float32, then cast. Adapters with other PEFT features are merged by PEFT, with a
warning: this needs memory for the model in float32, and casts every weight to one type, so a base of several types does not keep
them.

In both cases the merged model is loaded and its logits are compared with base + adapter. This also needs the memory of a model in
float32, on the CPU, where even a large one fits; the two are loaded one after the other.

Left out: several adapters into one model, and quantized bases (merging would have to quantize again).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tasks.convert.merge_checks import check_logits, check_tensors
from tasks.data.endings import check_ends, save_configs
from tasks.models.loading import (
    code_files,
    load_model,
    load_tokenizer,
    needs_remote_code,
    saved_tokenizer,
    template_hash,
    write_json,
)
from tasks.models.weights import Stored, stored_tensors, tensors_in
from tuneline.errors import StageFailed
from tuneline.kinds.merge import MergeStage
from tuneline.workspace.protocol import Events, Input, Request, Result
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    import torch

BLOCK = 2 * 2**20  # bytes of float32 rows at once: fits into the processor's cache
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names: ours
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PART = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
# LoraConfig fields that streaming supports, or that do not affect a merge. If any other field differs from its default, also one of
# a later PEFT, PEFT merges.
FOLLOWED = {"r", "lora_alpha", "use_rslora", "use_dora"}
HARMLESS = {
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "runtime_config",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
}  # fmt: skip


def run(request: Request, stage: MergeStage, events: Events) -> Result:
    from peft import PeftConfig

    adapter, payload = request.inputs["adapters.0"], request.payload
    assert adapter.base is not None
    base = model_folder(adapter.base.path)
    config = PeftConfig.from_pretrained(adapter.path)
    weights = stored_tensors(base)
    parts, others = lora_parts(adapter)
    refuse(adapter, config, [*parts, *others])

    dtype: str | None = None if stage.dtype == "auto" else stage.dtype
    reason = why_not_streamed(config, parts, others, weights)
    if reason:
        events.warning(f"merged by PEFT, with the whole model in memory, because {reason}")
        dtype = dtype or main_dtype(weights)
        merged = merge_with_peft(adapter, payload, dtype, stage.max_shard_size)
        for file in (base / "config.json", base / "generation_config.json"):  # not those that transformers 5 has rewritten
            if file.exists():
                shutil.copyfile(file, payload / file.name)
        if tokens := tokens_of(config):
            document = json.loads((payload / "config.json").read_text(encoding="utf-8"))
            text = document if "vocab_size" in document else document["text_config"]
            text["vocab_size"] = max(tokens, text["vocab_size"])
            write_json(payload / "config.json", document)
    else:
        merge_streamed(config, parts, weights, payload, stage, events)
        merged = len(parts)

    for file in code_files(adapter.base):
        shutil.copyfile(file, payload / file.name)
    for file in sorted(adapter.path.iterdir()):  # the trained side's tokenizer and template, unchanged
        if file.is_dir():  # named templates
            shutil.copytree(file, payload / file.name)
        elif not file.name.startswith("adapter_"):
            shutil.copyfile(file, payload / file.name)
    model = Input(path=payload, digest="", type="Model")
    tokenizer = saved_tokenizer(load_tokenizer(adapter), model)
    save_configs(payload if reason else base, payload, dtype, tokenizer, events)
    check_ends(payload, tokenizer)

    written = stored_tensors(payload)
    check_tensors(weights, written, tokens_of(config))
    difference = check_logits(adapter, model, tokenizer, main_dtype(written))
    metrics = {
        "bytes": sum(tensor.size for tensor in written.values()),
        "parameters": sum(math.prod(tensor.shape) for tensor in written.values()),
        "max_logit_difference": difference,
        "tensors_merged": merged,
    }
    return Result(metrics=metrics, info={"template": template_hash(tokenizer), "merged_by": "PEFT" if reason else "streaming"})


# --- reading ----------------------------------------------------------------------------------------------------------


def lora_parts(adapter: Input) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """Return the adapter's tensors by module and part (`lora_A.weight`, ...), and the names of its other tensors."""
    parts: dict[str, dict[str, Stored]] = {}
    others = []
    for name, tensor in tensors_in(adapter.path / "adapter_model.safetensors"):
        if match := PART.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            others.append(name)
    return parts, others


def main_dtype(tensors: dict[str, Stored]) -> str:
    """Return the dtype with the most bytes, among dtypes of weights."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.size
    return next(DTYPES[dtype] for dtype, _ in sizes.most_common() if dtype in DTYPES)


def refuse(adapter: Input, config: Any, names: list[str]) -> None:
    """Raises StageFailed(config) for two merges that would be wrong by either way."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES
    from transformers import AutoConfig

    assert adapter.base is not None
    base = model_folder(adapter.base.path)
    model = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=needs_remote_code(adapter))
    if "quantization_config" in json.loads((base / "config.json").read_text(encoding="utf-8")):
        raise StageFailed("config", "the adapter's base is quantized", "train on the full-precision model, merge, then quantize")
    tied = model.get_text_config().tie_word_embeddings and not (getattr(config, "ensure_weight_tying", False) or tokens_of(config))
    touched = sorted({part for name in names for part in name.split(".")} & set(EMBEDDING_LAYER_NAMES))
    if tied and touched:
        message = f"the adapter changes {' and '.join(touched)}, but the base's embeddings and head are one tied weight"
        raise StageFailed("config", message, "train without it: remove it from target_modules")


def tokens_of(config: Any) -> int:
    """Return the number of tokens that a model needs for those that the adapter adds; 0 if it adds none."""
    added = getattr(config, "trainable_token_indices", None) or {}
    return max((number + 1 for numbers in added.values() for number in numbers), default=0)


def why_not_streamed(config: Any, parts: dict[str, dict[str, Stored]], others: list[str], weights: dict[str, Stored]) -> str:
    """Return why PEFT has to merge; empty if streaming supports every tensor of the adapter."""
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        return f"the adapter is of type {config.peft_type.value}"
    given, default = vars(config), vars(LoraConfig())
    unusual = {field.name for field in fields(LoraConfig) if given[field.name] and given[field.name] != default[field.name]}
    if isinstance(config.init_lora_weights, bool):  # a name may mean a method that changed the base's weights, such as PiSSA
        unusual -= {"init_lora_weights"}
    if unusual := unusual - FOLLOWED - HARMLESS:
        return f"the adapter uses {', '.join(sorted(unusual))}"
    if others:
        return f"the adapter holds {others[0]}"
    whole = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    for module, part in parts.items():
        weight = weights.get(f"{module}.weight")
        if weight is None:
            return f"the base keeps {module} under another name or fused with others"
        if part.keys() != whole:
            return f"the adapter's tensors of {module} are {', '.join(sorted(part))}"
        if weight.dtype not in DTYPES or weight.shape != part["lora_B.weight"].shape[:1] + part["lora_A.weight"].shape[1:]:
            return f"{module} is no plain linear layer"
    return ""


# --- the merge --------------------------------------------------------------------------------------------------------


def merge_streamed(
    config: Any, parts: dict[str, dict[str, Stored]], weights: dict[str, Stored], payload: Path, stage: MergeStage, events: Events
) -> None:
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory

    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    codes = {ours: theirs for theirs, ours in DTYPES.items()}
    types = {name: codes.get(stage.dtype, w.dtype) if w.dtype in DTYPES else w.dtype for name, w in weights.items()}
    sizes = {name: w.size if types[name] == w.dtype else math.prod(w.shape) * BYTES[stage.dtype] for name, w in weights.items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors", max_shard_size=stage.max_shard_size
    )
    if plan.is_sharded:
        total = {**plan.metadata, "total_parameters": sum(math.prod(weight.shape) for weight in weights.values())}
        write_json(payload / "model.safetensors.index.json", {"metadata": total, "weight_map": plan.tensor_to_filename})
    # On blocks this small torch's own threads mostly wait for each other, so each tensor uses one thread, and several run at once.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
            # Wider types first, as in safetensors: every tensor is aligned to its type.
            names = sorted(names, key=lambda name: -sizes[name] // max(1, math.prod(weights[name].shape)))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in names:
                start, end = end, end + sizes[name]
                header[name] = {"dtype": types[name], "shape": weights[name].shape, "data_offsets": (start, end)}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            (payload / file).write_bytes(len(text).to_bytes(8, "little") + text)
            written = [
                pool.submit(
                    write_tensor, weights[name], types[name], parts.get(name.removesuffix(".weight"), {}), scaling,
                    payload / file, 8 + len(text) + header[name]["data_offsets"][0],
                )
                for name in names
            ]  # fmt: skip
            for future in written:
                future.result()
            events.progress(number, len(plan.filename_to_tensors), file)
    torch.set_num_threads(threads)


def write_tensor(weight: Stored, dtype: str, part: dict[str, Stored], scaling: float, file: Path, start: int) -> None:
    """Write the weight into `file` at `start`, with the adapter's part added: W + s B A, its rows scaled to their magnitude for DoRA."""
    import torch

    with weight.file.open("rb", buffering=0) as stream, file.open("r+b", buffering=0) as out:
        stream.seek(weight.start)
        out.seek(start)
        if not part and dtype == weight.dtype:
            copied = 0
            while copied < weight.size:  # copied within the kernel, at most 2 GiB a call
                copied += os.sendfile(out.fileno(), stream.fileno(), weight.start + copied, weight.size - copied)
            return
        lora = {name: read_float(tensor) for name, tensor in part.items()}
        rows, width = weight.shape[0] if weight.shape else 1, math.prod(weight.shape[1:])
        step = min(rows, max(1, BLOCK // (4 * max(1, width))))
        # Reuses three blocks: fresh memory would cost a page fault for every 4 kB.
        before, sums, after = (
            torch.empty(step, width, dtype=getattr(torch, kind)) for kind in (DTYPES[weight.dtype], "float32", DTYPES[dtype])
        )
        for first in range(0, rows, step):
            if first + step > rows:
                before, sums, after = before[: rows - first], sums[: rows - first], after[: rows - first]
            here = slice(first, first + len(sums))
            stream.readinto(before.view(torch.uint8).numpy())
            sums.copy_(before)
            if lora:
                sums.addmm_(lora["lora_B.weight"][here], lora["lora_A.weight"], alpha=scaling)
            if "lora_magnitude_vector" in lora:
                norm = torch.linalg.vector_norm(sums, dim=1)
                sums.mul_((lora["lora_magnitude_vector"][here] / norm).unsqueeze(1))
            out.write(after.copy_(sums).view(torch.uint8).numpy())


def read_float(tensor: Stored) -> torch.Tensor:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return read_rows(stream, tensor.dtype, 1, math.prod(tensor.shape)).float().view(tensor.shape)


def read_rows(stream: BinaryIO, dtype: str, rows: int, width: int) -> torch.Tensor:
    import torch

    block = torch.empty(rows, width, dtype=getattr(torch, DTYPES[dtype]))
    stream.readinto(block.view(torch.uint8).numpy())  # type: ignore[attr-defined]
    return block


def merge_with_peft(adapter: Input, payload: Path, dtype: str, max_shard_size: str) -> int:
    """Merge with PEFT. Returns the number of changed modules."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model: Any = load_model(adapter, torch.float32, place="cpu")
    changed = sum(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())
    merged = model.merge_and_unload().to(getattr(torch, dtype))
    merged.save_pretrained(payload, max_shard_size=max_shard_size)
    return changed
