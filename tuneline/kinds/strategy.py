"""Which ways of sharing a training work together with what: each rule names where that is known from."""

from __future__ import annotations

from collections.abc import Iterator

from tuneline.errors import Problem
from tuneline.kinds.stage import Resources


def strategy_problems(resources: Resources, dora: bool) -> Iterator[Problem]:
    strategy, offload, gpus = resources.strategy, resources.offload, resources.gpus
    zero = strategy.startswith("zero")
    if strategy == "fsdp" and not gpus:
        # accelerate 1.15, Accelerator.__init__: on CPUs the plugin is dropped without a word, and plain DDP trains.
        yield Problem(
            "resources.strategy", "found fsdp without GPUs, where accelerate trains plain ddp instead", "zero3 splits weights on CPUs, too"
        )
    if strategy == "fsdp" and dora:
        # peft/tuners/lora/dora.py takes the norm of whole weights; gather_params_ctx there gathers those of ZeRO-3 alone.
        yield Problem(
            "resources.strategy", "found fsdp with lora.use_dora, whose norms need whole weights", "use zero3, or leave use_dora out"
        )
    training_gpus = gpus - (resources.engine.gpus if resources.engine else 0)
    if training_gpus > 0 and resources.processes not in (None, training_gpus) and strategy != "device_map":
        # docs.nvidia.com, NCCL, "Creating a communicator": several ranks on one device are not allowed.
        found = (
            f"found {resources.processes} with {training_gpus} {'GPU' if training_gpus == 1 else 'GPUs'} to train on, expected one for each"
        )
        yield Problem("resources.processes", found, "leave it out")
    if strategy == "device_map":
        # huggingface.co/docs/accelerate/concept_guides/big_model_inference: one process, one layer after the other.
        if gpus < 2:
            found = f"found device_map with {gpus} {'GPU' if gpus == 1 else 'GPUs'}, expected two or more"
            yield Problem("resources.strategy", found, "leave it out: one device holds all layers")
        elif (resources.processes or 1) > 1 or resources.nodes > 1:
            yield Problem(
                "resources.strategy", "found device_map with several processes or machines, expected one", "remove processes and nodes"
            )
    if resources.world_size % resources.sequence_parallel_size:
        world = resources.world_size
        found = f"found {resources.sequence_parallel_size} with {world} {'process' if world == 1 else 'processes'}, expected "
        divisors = [str(n) for n in range(1, world + 1) if world % n == 0]
        hint = (
            f"processes share sequences in groups of this size: set `{'gpus' if gpus else 'processes'}: {resources.sequence_parallel_size}`"
        )
        yield Problem("resources.sequence_parallel_size", found + ", ".join(divisors), "leave it out" if strategy == "device_map" else hint)
    if offload and not gpus:
        yield Problem("resources.offload", f"found {offload} without GPUs, whose memory it would spare", "remove it")
    elif offload == "optimizer" and not zero:
        # torch.distributed.fsdp.CPUOffloadPolicy moves weights, gradients and optimizer states together.
        yield Problem(
            "resources.offload",
            f"found optimizer with {strategy}, expected with zero1, zero2 and zero3",
            "fsdp offloads `all`" if strategy == "fsdp" else "set `strategy: zero2`",
        )
    elif offload == "all" and strategy not in ("zero3", "fsdp"):
        # deepspeed.ai/docs/config-json: offload_param is "valid only with stage 3".
        yield Problem(
            "resources.offload",
            f"found all with {strategy}, expected with zero3 and fsdp",
            "set `offload: optimizer`" if zero else "set `strategy: zero3`",
        )
