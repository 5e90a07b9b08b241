"""How a command is started: its GPUs, processes and machines, and the batch that follows from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tuneline.imports.fates import Fate, Joined, Refused, Without, each
from tuneline.imports.shell import Command, Word
from tuneline.imports.translation import Given, Launch, Translation
from tuneline.imports.values import number, whole

FOR_RUN = "set it in the environment of `tuneline run`"
ENVIRONMENT: dict[str, Fate] = {
    **each("CUDA_VISIBLE_DEVICES NPROC_PER_NODE NNODES FORCE_TORCHRUN HIP_VISIBLE_DEVICES N_GPUS", Joined("train.resources.gpus")),
    **each("MASTER_ADDR MASTER_PORT NODE_RANK RANK WORLD_SIZE", Without("`tuneline node` joins the machines of a run")),
    **each("OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TOKENIZERS_PARALLELISM NCCL_DEBUG HF_ENDPOINT", Without(FOR_RUN)),
    **each("WANDB_API_KEY HF_TOKEN SWANLAB_API_KEY", Without(FOR_RUN)),
    **each("USE_HF USE_MODELSCOPE_HUB USE_MODELSCOPE VLLM_USE_MODELSCOPE", Without("models and data come from the Hugging Face hub")),
    **each("MAX_PIXELS MIN_PIXELS VIDEO_MAX_PIXELS IMAGE_MAX_TOKEN_NUM VIDEO_MAX_TOKEN_NUM FPS_MAX_FRAMES SPEAKER_NAME", (
        Refused("tuneline trains text models only")
    )),
    **each("ASCEND_RT_VISIBLE_DEVICES NPU_VISIBLE_DEVICES", Refused("tuneline trains on CPUs and on GPUs that torch calls cuda")),
}  # fmt: skip
LAUNCHERS = {
    "--nproc_per_node": "processes",
    "--nproc-per-node": "processes",
    "--num_processes": "processes",
    "--num_gpus": "processes",
    "--nnodes": "nodes",
    "--num_machines": "nodes",
}


def launch_of(command: Command) -> Launch:
    """Return how a command is started, from its variables and the flags of torchrun, accelerate or deepspeed before its program."""
    known: dict[str, Any] = {}
    visible = command.environment.get("CUDA_VISIBLE_DEVICES", Word("", 0)).text
    devices = tuple(int(part) for part in re.findall(r"\d{1,4}", visible)) if re.fullmatch(r"[\d, ]+", visible) else ()
    for name, kind in (("NPROC_PER_NODE", "processes"), ("NNODES", "nodes")):
        if name in command.environment:
            known[kind] = command.environment[name].text
    words = command.texts
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in LAUNCHERS and (equals or i + 1 < len(words)):
            known[LAUNCHERS[flag]] = value if equals else words[i + 1]
    counts = {kind: int(text) for kind, text in known.items() if re.fullmatch(r"[1-9]\d{0,3}", text)}
    in_order = devices == tuple(range(len(devices)))
    return Launch(len(devices) or None, () if in_order else devices, counts.get("processes"), counts.get("nodes", 1))


def environment_of(command: Command) -> dict[str, Given]:
    return {name: Given(word.text, word.line) for name, word in command.environment.items()}


def note_environment(translation: Translation) -> None:
    """Give every variable before the command its fate."""
    for name in translation.job.environment:
        fate = ENVIRONMENT.get(name, Without(FOR_RUN))
        if isinstance(fate, Without | Refused):
            translation.note(name, fate)


def place_on_devices(translation: Translation, spread: bool = False) -> int:
    """Write `resources` from how the command is started; return the number of processes. `spread`: one process without a launcher
    places layers on all its GPUs."""
    launch = translation.job.launch
    processes = launch.processes or (1 if spread else launch.gpus or 1)
    if spread and launch.processes is None and (launch.gpus or 1) > 1:
        translation.write("train.resources.gpus", launch.gpus)
        translation.write("train.resources.strategy", "device_map")
    else:
        guessed = launch.gpus is None and launch.processes is None
        translation.write("train.resources.gpus", processes, "the source does not say how many" if guessed else "")
        if launch.gpus and launch.gpus > processes:
            translation.remarks.append(
                f"each of {processes} processes used several of {launch.gpus} GPUs (device_map): if the model does not fit one GPU, write "
                f"`gpus: {launch.gpus}` and `strategy: zero3`"
            )
    if launch.devices and len(launch.devices) == translation.parts["train"]["resources"]["gpus"]:
        translation.write("train.resources.devices", list(launch.devices))
    if launch.nodes > 1:
        translation.write("train.resources.nodes", launch.nodes)
    return processes * launch.nodes


def write_batch(translation: Translation, per_device: Any, accumulation: Any, processes: int, keys: tuple[str, str]) -> None:
    """Write the rows per step: rows per device x accumulation x processes. Values that are no whole numbers are refused by name."""
    try:
        micro, steps = whole(per_device), whole(accumulation)
    except (ValueError, OverflowError):
        for key in keys:
            if key in translation.job.given:
                translation.note(key, Refused("its value is not in the source: write `global_batch_size` and `resources.micro_batch_size`"))
        return
    translation.write("train.global_batch_size", micro * steps * processes, f"{micro} rows x {steps} accumulation x {processes} processes")
    translation.write("train.resources.micro_batch_size", micro, key=keys[0])
    translation.origins["train", "global_batch_size"] = keys[1] if keys[1] in translation.job.given else keys[0]


def write_deepspeed(translation: Translation, key: str) -> None:
    """Write the strategy of a DeepSpeed configuration: by its name, its file, or its content."""
    value = translation.value(key)
    if value in (None, "", False) or "train" not in translation.parts:
        translation.note(key, Without("it is off, as here"))
        return
    stage, offload = _zero(value, translation.job.path(value) if isinstance(value, str) and value.endswith(".json") else None)
    if stage is None:
        translation.note(key, Refused("write `resources: {strategy: zero3}` (or zero1, zero2)"))
        return
    translation.use(key)
    translation.write("train.resources.strategy", f"zero{stage}" if stage else "ddp", key=key)
    if offload and stage:
        translation.write("train.resources.offload", offload if stage == 3 else "optimizer", key=key)


def _zero(value: Any, file: Path | None) -> tuple[int | None, str]:
    """Return ZeRO's stage and what is offloaded (`all`, `optimizer` or nothing)."""
    if file is not None:
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            value = file.stem
    if isinstance(value, dict):
        zero = value.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        stage = zero.get("stage", 0)
        devices = [zero.get(f"offload_{what}", {}) for what in ("param", "optimizer")]
        used = [isinstance(device, dict) and device.get("device") == "cpu" for device in devices]
        return (stage if stage in (0, 1, 2, 3) else None), "all" if used[0] else "optimizer" if used[1] else ""
    match = re.search(r"(?:zero|z)[-_]?([0-3])", str(value).lower())
    return (int(match[1]) if match else None), "all" if "offload" in str(value).lower() else ""


def drop_unused(translation: Translation) -> None:
    """Drop default epochs beside a number of steps, and a warm-up that a constant schedule ignores in the source as well."""
    train = translation.parts["train"]
    if "max_steps" in train and ("train", "num_train_epochs") not in translation.origins:
        train.pop("num_train_epochs", None)
    if train.get("lr_scheduler_type") == "constant" and train.pop("warmup_steps", 0):
        translation.remarks.append("the source names a warm-up, which a constant learning rate ignores")


def share(value: Any) -> float:
    """Return a share of rows below 1. Raises ValueError for others."""
    found = number(value)
    if not 0 <= found < 1:
        raise ValueError
    return float(found)
