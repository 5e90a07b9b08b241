"""ROLL: the YAML of an RLVR pipeline, with its `${...}` and `list(range(0,16))`."""

from __future__ import annotations

import re
from typing import Any

from tuneline.imports.fates import Without
from tuneline.imports.huggingface import MEGATRON, NO_FIELD
from tuneline.imports.launch import drop_unused, place_on_devices, write_batch
from tuneline.imports.rl import OWN, REWARDS, whole_groups
from tuneline.imports.roll_keys import DEFAULTS, INFER, TABLE, TRAIN
from tuneline.imports.stages import begin_training, is_true, without_dropout, write_evaluation, write_model, write_seed
from tuneline.imports.translation import Given, Job, Launch, Translation
from tuneline.imports.values import names, number

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
RANGE = re.compile(r"range\(\s*(?:(\d{1,5})\s*,\s*)?(\d{1,5})\s*\)")
ESTIMATORS = ("grpo", "reinforce")


def translate(job: Job, earlier: dict[str, str]) -> Translation:
    """Translate one file."""
    job.given = {key: Given(_resolved(given.value, job.given, 0), given.line) for key, given in job.given.items()}
    translation = Translation(job)
    estimator = str(translation.value("adv_estimator", default="gae"))
    if estimator not in ESTIMATORS:
        found = f"found adv_estimator: {estimator}, expected grpo or reinforce"
        raise job.wrong("adv_estimator", found, "write `adv_estimator: grpo`: tuneline has no critic and no environments")
    write_model(translation, "pretrain")
    begin_training(translation, "grpo", "adv_estimator")
    if estimator == "reinforce":
        translation.remarks.append("REINFORCE has no groups; grpo compares each completion with the others of its prompt")
    translation.apply(TABLE, DEFAULTS)
    _devices(translation)
    group = translation.value(f"{INFER}generating_args.num_return_sequences", "num_return_sequences_in_group", default=8)
    if isinstance(group, int) and group > 1:
        translation.write("train.num_generations", group)
        translation.use(f"{INFER}generating_args.num_return_sequences", "num_return_sequences_in_group")
    if is_true(translation.value("use_kl_loss", default=False)):
        translation.write("train.beta", number(translation.value("kl_loss_coef", default=0)), key="use_kl_loss")
    translation.use("use_kl_loss", "kl_loss_coef")
    whole_groups(translation)
    without_dropout(translation, f"{TRAIN}model_args.lora_dropout")
    _rewards(translation)
    _sources(translation)
    write_seed(translation, 42)
    drop_unused(translation)
    return translation


def _resolved(value: Any, given: dict[str, Given], depth: int) -> Any:
    """Return a value with `${key}` replaced by the value of that key; one that is unknown stays."""
    if isinstance(value, list):
        return [_resolved(item, given, depth) for item in value]
    if not isinstance(value, str) or "${" not in value or depth > 8:
        return value
    whole_value = REFERENCE.fullmatch(value)
    if whole_value and whole_value[1] in given:
        return _resolved(given[whole_value[1]].value, given, depth + 1)
    parts = REFERENCE.split(value)
    if len(value) > 1000:
        return value
    return "".join(
        str(_resolved(given[part].value, given, depth + 1)) if i % 2 and part in given else f"${{{part}}}" if i % 2 else part
        for i, part in enumerate(parts)
    )


def _devices(translation: Translation) -> None:
    mapping = translation.value(f"{TRAIN}device_mapping", default=translation.value("num_gpus_per_node", default=1))
    count = _count(mapping)
    per_node = translation.value("num_gpus_per_node", default=8)
    per_node = per_node if isinstance(per_node, int) and per_node > 0 else 8
    nodes = count // per_node if count > per_node and count % per_node == 0 else 1
    translation.job.launch = Launch(count // nodes, (), count // nodes, nodes)
    processes = place_on_devices(translation)
    translation.use(f"{TRAIN}device_mapping", "num_gpus_per_node", "num_nodes")
    keys = (f"{TRAIN}training_args.per_device_train_batch_size", f"{TRAIN}training_args.gradient_accumulation_steps")
    write_batch(translation, translation.value(keys[0], default=8), translation.value(keys[1], default=1), processes, keys)
    translation.use(*keys)
    translation.note("rollout_batch_size", Without("a step samples global_batch_size completions"))
    _strategy(translation)


def _strategy(translation: Translation) -> None:
    prefix = f"{TRAIN}strategy_args."
    name = str(translation.value(f"{prefix}strategy_name", default=""))
    config = str(translation.value(f"{prefix}strategy_config", default=""))
    if "deepspeed" in name:
        stage = match[1] if (match := re.search(r"zero_?([123])", config)) else "2"
        written = "zero2" if stage == "3" and not translation.lacks("train.rollouts") else f"zero{stage}"
        translation.write(
            "train.resources.strategy", written, "zero2 is what runs with rollouts by vLLM" if written != f"zero{stage}" else ""
        )
        translation.use(f"{prefix}strategy_name", f"{prefix}strategy_config")
    elif "fsdp" in name:
        translation.write("train.resources.strategy", "zero2", "ROLL's FSDP shards for training; zero2 is what runs with rollouts by vLLM")
        translation.use(*(key for key in translation.job.given if key.startswith(prefix)))
    for key in translation.job.given:
        if key.startswith(prefix) and key not in translation.used:
            translation.note(key, MEGATRON if "megatron" in name else NO_FIELD)


def _count(mapping: Any) -> int:
    """Return the number of devices of `list(range(0,16))`, `[0, 1]` or a number."""
    if isinstance(mapping, list):
        return max(1, len(mapping))
    if isinstance(mapping, str):
        return max(1, sum(max(0, int(end) - int(start or 0)) for start, end in RANGE.findall(mapping)))
    return mapping if isinstance(mapping, int) and 0 < mapping < 10_000 else 1


def _rewards(translation: Translation) -> None:
    found: list[dict[str, Any]] = []
    workers = [key for key in translation.job.given if re.fullmatch(r"rewards\.[^.]+\.worker_cls", key)]
    for key in workers:
        name, worker = key.split(".")[1], str(translation.value(key)).rpartition(".")[2]
        reward = REWARDS.get(worker) or REWARDS.get(name)
        if reward is None:
            translation.remarks.append(f"the reward `{name}` ({worker}) has no counterpart: {OWN}")
        elif reward not in found:
            found.append(reward)
        if reward:
            translation.use(key)
    if len(found) > 1:
        translation.remarks.append("ROLL applies a reward to the rows with its tags; here every reward scores every row")
    if not found:
        found = [{"file": "rewards.py", "function": "score"}]
        translation.missing.append("rewards.py")
        translation.remarks.append(f"none of the rewards has a counterpart: {OWN}")
    translation.write("train.rewards", found, key=workers[0] if workers else "rewards")


def _sources(translation: Translation) -> None:
    prefix = f"{TRAIN}data_args."
    messages = translation.value(f"{prefix}messages")
    columns = {"prompt": messages} if isinstance(messages, str) and messages else {}
    if {"type": "math_equal"} in translation.parts["train"]["rewards"]:
        columns["answer"] = "ground_truth"
    more = {"format": "prompt", **({"columns": columns} if columns else {})}
    found = _files(translation, prefix, more)
    if not found:
        raise translation.job.wrong(f"{prefix}file_name", "found no files of rows, expected one or more", "name them in the source")
    translation.write("data.sources", found, key=f"{prefix}file_name")
    translation.use(*(f"{prefix}{name}" for name in ("file_name", "dataset_dir", "messages", "prompt")))
    if held_out := _files(translation, "validation.data_args.", more):
        write_evaluation(translation, held_out, "validation.data_args.file_name")


def _files(translation: Translation, prefix: str, more: dict[str, Any]) -> list[dict[str, Any]]:
    folder = str(translation.value(f"{prefix}dataset_dir", default="."))
    files = names(translation.value(f"{prefix}file_name", default=[]))
    paths = [file if "/" in file or folder == "." else f"{folder}/{file}" for file in files]
    return [{"type": "files", "path": translation.local(path), **more} for path in paths]
