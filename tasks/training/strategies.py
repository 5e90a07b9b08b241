"""Configures how devices share a training, and checks that the configured strategy is the one that trains.

accelerate silently ignores settings that do not suit a machine (1.15: FSDP on CPUs becomes plain DDP), so the active strategy is
checked once everything has been prepared. Imports torch at the top because it subclasses; programs import it inside `run`.
`tasks.training.sequences` shares sequences between processes. Left out: tensor and pipeline parallelism.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from tasks.models.attention import set_attention
from tasks.models.loading import load_model
from tuneline.errors import StageFailed
from tuneline.kinds.stage import Resources
from tuneline.kinds.training import Training
from tuneline.patches import patch
from tuneline.workspace.checkpoints import processes
from tuneline.workspace.protocol import Input

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer, TrainingArguments


def arguments(resources: Resources) -> dict[str, Any]:
    """Return the strategy's entries of `TrainingArguments`."""
    strategy = resources.strategy
    given: dict[str, Any] = {
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": resources.gradient_checkpointing and strategy != "fsdp",
        # Re-entrant checkpointing breaks DDP; PEFT under ZeRO-3 needs it (github.com/huggingface/trl/issues/2514).
        "activation_checkpointing_kwargs": {"use_reentrant": strategy == "zero3"},
    }
    if resources.uses_deepspeed:
        given["deepspeed"] = zero_config(resources)
    elif strategy == "fsdp":
        given |= {"fsdp": True, "fsdp_config": fsdp_config(resources)}
        # Without it each process holds the whole gradients until the step's last micro-batch (accelerate's docs/source/concept_guides/
        # gradient_synchronization.md), the memory that FSDP should save.
        given["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return given


def sum_in_float32(arguments: TrainingArguments) -> None:
    """Make FSDP compute in bfloat16, but sum gradients and return losses in float32, as ddp does.

    accelerate 1.15 uses bfloat16 for everything (`FullyShardedDataParallelPlugin.set_mixed_precision`), also losses, and transformers
    has no argument for it. The types are torchtitan's defaults (`mixed_precision_param`, `mixed_precision_reduce`).
    """
    if arguments.fsdp and arguments.bf16:
        policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy


def join_processes(resources: Resources) -> None:
    """Initialize the process group on CPUs. transformers 5.23 does this too, but uses `ddp_timeout` only on GPUs: a process that hangs
    would block the others forever.

    On GPUs accelerate does it, with gloo for what FSDP keeps on the CPU if the environment says so, as its own launcher does.

    On CPUs DeepSpeed would compile an operator that sums in shared memory, at the first training of each runtime and for more than a
    minute (comm/torch.py of 0.19.8). It uses gloo instead, as where nothing can be compiled.
    """
    if resources.uses_deepspeed or resources.sequence_parallel_size > 1:
        patch(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    if resources.strategy == "fsdp" and resources.offload:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    if "RANK" in os.environ and not torch.cuda.is_available() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=resources.collective_timeout))


def zero_config(resources: Resources) -> dict[str, Any]:
    """Return DeepSpeed's configuration (arXiv:1910.02054); transformers fills in `auto` from its own arguments."""
    level = int(resources.strategy[-1])
    zero: dict[str, Any] = {"stage": level, "overlap_comm": resources.gpus > 0, "contiguous_gradients": True}
    if resources.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if resources.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if level == 3:
        zero |= dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "reduce_bucket_size"), "auto")
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    batch = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **batch}


def fsdp_config(resources: Resources) -> dict[str, Any]:
    """Return FSDP2's configuration for transformers. It wraps the model's own decoder layers (`_no_split_modules`)."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "cpu_offload": resources.offload is not None,
        "activation_checkpointing": resources.gradient_checkpointing,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,  # it needs the model on the meta device
    }


def load_base(source: Input, stage: Training, dtype: torch.dtype, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Load the base model as the strategy needs it, with the stage's attention. The training arguments must have been made before."""
    if stage.resources.strategy == "zero3":  # splits weights while they are read
        import deepspeed

        deepspeed.init_distributed(torch.distributed.get_backend())
    model = load_model(source, dtype, {"device_map": "balanced", "fsdp": "cpu"}.get(stage.resources.strategy), quantization)
    set_attention(model, stage)
    return model


def unwrapped(name: str) -> str:
    """Return a parameter's name without the wrappers of FSDP's checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Copy a whole parameter to the CPU, in the optimizer's precision. Every process must call it."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full.detach().cpu().clone()
    full = parameter.full_tensor() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter
    return full.detach().cpu().clone()


def verify_strategy(trainer: Trainer, resources: Resources) -> None:
    """Raises StageFailed(bug) unless the configured strategy is the one that is about to train."""
    wanted, found = resources.strategy, detect_strategy(trainer)
    if found != (wanted if resources.world_size > 1 or wanted != "ddp" else "one process"):
        raise StageFailed("bug", f"resources.strategy: found {found}, expected {wanted}", "please report this, with the log")
    print(f"{found} trains, over {processes(resources.world_size)}" if found != "one process" else "one process trains", flush=True)


def detect_strategy(trainer: Trainer) -> str:
    """Return the strategy that trains, judged by the types of model and optimizer."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    wrapped, world = trainer.model_wrapped, trainer.args.world_size
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # compiled
    if hasattr(wrapped, "zero_optimization_stage"):
        level = wrapped.zero_optimization_stage()
        if level == 3:
            parameters = list(wrapped.module.parameters())
            held, everything = sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters)
        else:
            held = sum(part.numel() for part in wrapped.optimizer.single_partition_of_fp32_groups)
            everything = sum(p.numel() for p in wrapped.module.parameters() if p.requires_grad)
        split = held < everything or world == 1
        gradients = level != 2 or wrapped.optimizer.partition_gradients
        return f"zero{level}" if split and gradients else f"DeepSpeed at stage {level} that splits nothing"
    if isinstance(wrapped, FSDPModule):
        names = set(trainer.model._no_split_modules or ())
        # FSDP gives each sharded module a new class, `FSDPLlamaDecoderLayer`, derived from the original one.
        layers = [module for module in wrapped.modules() if names & {each.__name__ for each in type(module).__mro__}]
        sharded = all(isinstance(p, torch.distributed.tensor.DTensor) for p in wrapped.parameters())
        return "fsdp" if layers and sharded and all(isinstance(layer, FSDPModule) for layer in layers) else "FSDP that wraps no layers"
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    devices = set(getattr(trainer.model, "hf_device_map", {}).values())
    return "device_map" if len(devices) > 1 else "one process" if world == 1 else f"{world} independent processes"
