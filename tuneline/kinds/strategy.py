"""Valid combinations of distribution strategies and other settings. Each rule names its source."""

from __future__ import annotations

from collections.abc import Iterator

from tuneline.errors import Problem
from tuneline.kinds.stage import Resources


def process_problems(resources: Resources, of: str = "training") -> Iterator[Problem]:
    gpus = resources.gpus - (resources.engine.gpus if resources.engine else 0)
    if gpus > 0 and resources.processes not in (None, gpus):
        # docs.nvidia.com, NCCL, "Creating a communicator": several ranks on one device are not allowed.
        with_gpus = f"{gpus} {'GPU' if gpus == 1 else 'GPUs'}"
        found = f"found {resources.processes} with {with_gpus} for {of}, expected one process per GPU"
        yield Problem("resources.processes", found, "remove it")


def strategy_problems(resources: Resources, dora: bool) -> Iterator[Problem]:
    strategy, offload, gpus = resources.strategy, resources.offload, resources.gpus
    zero = resources.uses_deepspeed
    if strategy == "fsdp" and not gpus:
        # accelerate 1.15, Accelerator.__init__: on CPUs the plugin is dropped silently and plain DDP is used.
        yield Problem(
            "resources.strategy",
            "found fsdp without GPUs, where accelerate silently uses ddp",
            "set `strategy: zero3`, which also shards on CPUs",
        )
    if strategy == "fsdp" and dora:
        # peft/tuners/lora/dora.py needs the norm of unsharded weights; its gather_params_ctx supports only ZeRO-3.
        yield Problem(
            "resources.strategy",
            "found fsdp with lora.use_dora, which needs unsharded weights",
            "set `strategy: zero3`, or remove use_dora",
        )
    if strategy != "device_map":
        yield from process_problems(resources)
    if strategy == "device_map":
        # huggingface.co/docs/accelerate/concept_guides/big_model_inference: one process, one layer after the other.
        if gpus < 2:
            found = f"found device_map with {gpus} {'GPU' if gpus == 1 else 'GPUs'}, expected two or more"
            yield Problem("resources.strategy", found, "remove it: a single device holds all layers")
        elif (resources.processes or 1) > 1 or resources.nodes > 1:
            yield Problem(
                "resources.strategy", "found device_map with several processes or machines, expected one", "remove processes and nodes"
            )
    if resources.world_size % resources.sequence_parallel_size:
        world = resources.world_size
        found = f"found {resources.sequence_parallel_size} with {world} {'process' if world == 1 else 'processes'}, expected "
        divisors = [str(n) for n in range(1, world + 1) if world % n == 0]
        hint = (
            f"the number of processes must be a multiple of it: set `{'gpus' if gpus else 'processes'}: {resources.sequence_parallel_size}`"
        )
        yield Problem("resources.sequence_parallel_size", found + ", ".join(divisors), "remove it" if strategy == "device_map" else hint)
    if offload and not gpus:
        yield Problem("resources.offload", f"found {offload} without GPUs: offloading only saves GPU memory", "remove it")
    elif offload == "optimizer" and not zero:
        # torch.distributed.fsdp.CPUOffloadPolicy moves weights, gradients and optimizer states together.
        yield Problem(
            "resources.offload",
            f"found optimizer with {strategy}, expected zero1, zero2 or zero3",
            "set `offload: all`, which fsdp supports" if strategy == "fsdp" else "set `strategy: zero2`",
        )
    elif offload == "all" and not resources.shards_weights:
        # deepspeed.ai/docs/config-json: offload_param is "valid only with stage 3".
        yield Problem(
            "resources.offload",
            f"found all with {strategy}, expected zero3 or fsdp",
            "set `offload: optimizer`" if zero else "set `strategy: zero3`",
        )
