"""Runs gptqmodel 7.6: GPTQ with settings that were measured on CPUs, and reproducible files.

Importing gptqmodel patches transformers and safetensors, sets environment variables and starts threads, so `prepare` must run
before torch is imported, and this runs only in a program's own process. On a GPU gptqmodel's own defaults are used.

Changed for CPUs, on SmolLM2-135M with 16 texts (76 s instead of 156 to 385 s): float32 instead of bfloat16, one thread per worker,
no animated progress bar, no folder of finished layers on disk, and one forward pass per layer instead of four (`true_sequential:
false`: perplexity 13.22 instead of 13.15). The last one changes the result, so it depends on the compute type, which is in the key,
and not on the device.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.loading import compute_type
from tasks.models.weights import INDEX, weight_files
from tuneline.errors import StageFailed
from tuneline.kinds.quantize import QuantizeStage
from tuneline.patches import patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FALLBACK = "fallback"  # gptqmodel writes this into the loss of a layer that it rounded to nearest


def prepare() -> None:
    """Set what torch, logbar and gptqmodel read once, when they are imported."""
    # OpenMP threads that spin while they wait would take the cores from the workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The progress bar redraws from two threads of its own, even into a file; the other bars are tqdm's.
    os.environ |= {"LOGBAR_ANIMATION": "0", "LOGBAR_PROGRESS_OUTPUT_INTERVAL": "1000000", "TERM": "dumb", "TQDM_DISABLE": "1"}
    # The C++ packer is compiled at first use, into the home folder; the Python one gives the same bytes in a few seconds more.
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"

    import torch
    from huggingface_hub import constants

    os.environ.setdefault("HF_HOME", constants.HF_HOME)  # gptqmodel would set it to a folder below /tmp
    if not torch.cuda.is_available():
        # The default is half the cores; the loader asks for 2 and fails on a machine with 2.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, torch.get_num_threads())))


def quiet() -> None:
    """Hide the banner and tables that gptqmodel logs as information at import."""
    from logbar import LogBar

    LogBar.shared().setLevel(logging.WARNING)


def layer_names(source: Path, model: PreTrainedModel) -> set[str]:
    """Return the layers that gptqmodel quantizes in a block, such as `self_attn.q_proj`; empty if it does not find the blocks."""
    quiet()
    from gptqmodel import QuantizeConfig
    from gptqmodel.models.auto import check_and_get_model_definition

    definition, config = check_and_get_model_definition(str(source)), QuantizeConfig()
    tree = definition._resolve_effective_module_tree(model, config)
    if tree is None:
        return set()
    with definition._module_tree_context(tree):
        return {name for block in definition.simple_layer_modules(model.config, config) for name in block}


def quantize(
    source: Path, rows: list[list[int]], stage: QuantizeStage, payload: Path, meta: Path, layer_done: Callable[[], None]
) -> dict[str, str]:
    """Write the weights and config.json into `payload`. Returns each quantized layer's loss, as in gptqmodel's log."""
    import torch

    quiet()
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.manual_seed(stage.seed)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        share_threads()
    config = QuantizeConfig(
        bits=stage.bits,
        group_size=stage.group_size,
        desc_act=stage.desc_act,
        sym=stage.sym,
        # Sorts whole groups by importance but stores them in order, for serving; needs groups, and excludes desc_act.
        act_group_aware=stage.group_size > 0 and not stage.desc_act,
        true_sequential=stage.dtype != "float32",
        device="cpu" if on_cpu else None,
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(source), config, dtype=compute_type(stage))
    model.layer_callback = lambda layer_idx, submodule_finalized: layer_done() if submodule_finalized else None
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    # Rows of up to 10 tokens would be dropped: gptqmodel 7.6 does not pass on `quantize(calibration_data_min_length=)`.
    patch(model, "prepare_dataset", partial(model.prepare_dataset, calibration_data_min_length=0))
    logs = model.quantize(calibration, batch_size=1)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each file that it saves
        model.save(str(payload))
    (payload / "quant_log.csv").rename(meta / "quant_log.csv")  # it contains times, so not in the payload
    make_canonical(payload)
    entries = [entry for part in logs.values() for entry in part]
    # A layer outside any expert sees every token.
    seen, given = max(int(entry["samples"]) for entry in entries), sum(map(len, rows))
    if seen != given:
        raise StageFailed("bug", f"calibration: found {seen:,} tokens in gptqmodel's log, expected {given:,}")
    return {f"{entry['layer']}.{entry['module']}": str(entry["loss"]) for entry in entries}


def rounded(losses: dict[str, str]) -> list[str]:
    """Return the layers that too few tokens reached, or whose loss is no number: gptqmodel rounds those to nearest."""
    return sorted(name for name, loss in losses.items() if FALLBACK in loss or not math.isfinite(float(loss)))


def share_threads() -> None:
    """Keep the OpenMP threads of the main thread, which runs the forward passes, and give each quantizing worker a single one.

    The workers quantize several matrices at once, column by column, in operations too small to parallelize. OpenMP keeps the number
    per calling thread, and torch sets it at a thread's first operation, so every worker must run an operation now.
    """
    import torch
    from gptqmodel import get_device_thread_pool

    workers = int(os.environ["GPTQMODEL_CPU_WORKERS"])
    threads = torch.get_num_threads()
    barrier = threading.Barrier(workers)  # makes each worker wait for all, so that each gets exactly one task

    def settle() -> None:
        barrier.wait(timeout=60)
        torch.set_num_threads(1)

    pool = get_device_thread_pool()
    for future in [pool.submit(torch.device("cpu"), settle) for _ in range(workers)]:
        future.result()
    torch.set_num_threads(threads)


def make_canonical(payload: Path) -> None:
    """Keep only weights and configs, without facts about this host, and store unquantized weights in at most 16 bits."""
    from safetensors.torch import load_file, save_file

    size = 0
    for file in weight_files(payload):
        tensors = {name: narrowed(name, tensor) for name, tensor in sorted(load_file(file).items())}
        save_file(tensors, file, {"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
    kept = {file.name for file in weight_files(payload)} | {"config.json", "quantize_config.json", INDEX}
    for file in payload.iterdir():  # tokenizer files, which gptqmodel changes
        if file.name not in kept:
            file.unlink()
    for file in sorted(payload.glob("*.json")):
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for part in (document, document.get("quantization_config", {})):
            part.get("meta", {}).pop("offload_to_disk", None)
            part.get("meta", {}).pop("offload_to_disk_path", None)  # a random folder below /tmp
        document.pop("_name_or_path", None)
        if document.get("dtype") == "float32":
            document["dtype"] = "float16"
        if file.name == INDEX:
            document["metadata"]["total_size"] = size
        file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def narrowed(name: str, tensor: Any) -> Any:
    """Cast float32 to float16: on a CPU gptqmodel saves everything in its compute type, but all kernels expect float16 scales."""
    import torch

    if tensor.dtype != torch.float32:
        return tensor.contiguous()
    narrow = tensor.to(torch.float16).contiguous()
    if not torch.isfinite(narrow).all():
        hint = "GPTQ's unquantized weights are stored in 16 bits: quantize a bfloat16 model, on a GPU"
        raise StageFailed("data", f"{name} holds values beyond float16's largest, 65504", hint)
    return narrow
