"""axolotl: one YAML file of a training."""

from __future__ import annotations

from typing import Any

from tuneline.config.hints import repository
from tuneline.imports.axolotl_keys import DEFAULTS, TABLE
from tuneline.imports.fates import Fate, Refused, Without, fate_of
from tuneline.imports.launch import drop_unused, note_environment, place_on_devices, write_batch, write_deepspeed
from tuneline.imports.rl import fit_to_engine, whole_groups, write_engine, write_rewards
from tuneline.imports.stages import (
    begin_training,
    continue_adapter,
    finish_adapter,
    without_dropout,
    write_evaluation,
    write_model,
    write_schedule,
    write_seed,
    write_validation,
)
from tuneline.imports.translation import Given, Job, Note, Translation, exists
from tuneline.imports.values import names

KINDS = {"": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto", "grpo": "grpo"}
FORMATS = {
    "alpaca": "alpaca", "completion": "text", "chat_template": "auto", "sharegpt": "sharegpt", "chatml.intel": "auto",
    "chat_template.default": "auto", "chatml.default": "auto", "chatml.ultra": "auto", "pretrain": "text",
}  # fmt: skip


def translate(job: Job, earlier: dict[str, str]) -> Translation:
    """Translate one file."""
    translation = Translation(job)
    rl, adapter = str(translation.value("rl", default="")), str(translation.value("adapter", default=""))
    write_model(translation, "base_model")
    begin_training(translation, KINDS.get(rl, rl), "rl" if rl else "base_model")
    defaults = {key: value for key, value in DEFAULTS.items() if key != "warmup_ratio" or "warmup_steps" not in job.given}
    translation.apply(TABLE, defaults | ({"rl_beta": 0.1} if rl in ("dpo", "ipo", "kto") else {}))
    if rl == "ipo":
        translation.write("train.loss_type", "ipo")
    if rl == "grpo":
        translation.parts["train"].pop("max_length", None)
        write_rewards(translation, "trl.reward_funcs", translation.value("trl.reward_weights"))
        translation.use("trl.reward_weights")
        if translation.on("trl.use_vllm"):
            write_engine(translation, "vllm.gpu_memory_utilization", "vllm.max_model_len")
        translation.use("trl.use_vllm", "trl.vllm_mode")
    else:
        _method(translation, adapter)
    _batch(translation)
    continue_adapter(translation, earlier, "lora_model_dir")
    for key in ("datasets", "pretraining_dataset"):
        entries = translation.value(key, default=[])
        for entry in entries if isinstance(entries, list) else [entries]:
            translation.parts["data"]["sources"].append(_source(translation, entry, key))
        translation.use(key)
        if entries:
            translation.origins["data", "sources"] = key
    held_out = translation.value("test_datasets", default=[])
    if isinstance(held_out, list) and held_out:
        write_evaluation(translation, [_source(translation, entry, "test_datasets") for entry in held_out], "test_datasets")
    if not translation.parts["data"]["sources"]:
        raise job.wrong("datasets", "found no datasets, expected `datasets:`", "name the datasets in the source")
    finish_adapter(translation)
    without_dropout(translation)
    note_environment(translation)
    return translation


def _method(translation: Translation, adapter: str) -> None:
    four, eight = translation.on("load_in_4bit"), translation.on("load_in_8bit")
    if adapter not in ("", "lora", "qlora"):
        translation.note("adapter", Refused("write `method: lora`, qlora or full"))
    if not adapter:
        translation.write("train.method", "full", "no adapter trains all weights")
    elif adapter == "qlora" or four or eight:
        translation.write("train.method", "qlora", key="adapter")
        if eight and not four:
            translation.write("train.bits", 8, key="load_in_8bit")
    translation.use("adapter", "load_in_4bit", "load_in_8bit")


def _batch(translation: Translation) -> None:
    keys = ("micro_batch_size", "gradient_accumulation_steps")
    processes = place_on_devices(translation)
    write_batch(translation, translation.value(keys[0], default=1), translation.value(keys[1], default=1), processes, keys)
    translation.use(*keys, "batch_size", "use_wandb")
    if "deepspeed" in translation.job.given:
        write_deepspeed(translation, "deepspeed")
    if any(key.startswith("fsdp_config.") for key in translation.job.given) or translation.value("fsdp"):
        translation.write("train.resources.strategy", "fsdp", key="fsdp")
        offloads = ("fsdp_config.offload_params", "fsdp_config.fsdp_offload_params")
        if translation.on(*offloads):
            translation.write("train.resources.offload", "all")
        translation.use(*offloads, "fsdp_config")
    least = translation.value("cosine_min_lr_ratio")
    if isinstance(least, int | float):
        translation.write("train.lr_scheduler_type", "cosine_with_min_lr", key="cosine_min_lr_ratio")
        translation.write("train.min_lr_ratio", least, key="cosine_min_lr_ratio")
    fit_to_engine(translation)
    whole_groups(translation)
    write_validation(translation, "val_set_size")
    write_seed(translation, 42)
    drop_unused(translation)
    write_schedule(translation)


def _source(translation: Translation, entry: Any, key: str) -> dict[str, Any]:
    """Return the source of one entry of `datasets:`."""
    if not isinstance(entry, dict):
        entry = {"path": str(entry)}
    flat = _flat(entry)
    line = translation.job.given[key].line
    for name, value in flat.items():
        fate: Fate = fate_of(f"datasets[].{name}", TABLE)
        if isinstance(fate, Without | Refused):
            translation.notes.append(Note(f"{key}.{name}", Given(value, line), fate))
    path, form = str(flat.get("path", "")), flat.get("type", "completion" if key == "pretraining_dataset" else "chat_template")
    if path in ("json", "csv", "parquet", "text") and flat.get("data_files"):
        path = str(names(flat["data_files"])[0])
    hub = None if exists(translation.job.path(path)) else repository(path)
    source: dict[str, Any] = {"type": "hub", "repo": hub} if hub else {"type": "files", "path": translation.local(path)}
    if hub:
        source |= {
            ours: str(flat[theirs]) for theirs, ours in (("name", "subset"), ("split", "split")) if flat.get(theirs) not in (None, "train")
        }
    known = FORMATS.get(str(form).split(":")[0]) if isinstance(form, str) else "auto"
    if known is None:
        hint = "write `format:` and `columns:` of the source"
        translation.notes.append(Note(f"{key}.type", Given(form, line), Refused(hint)))
    elif known != "auto":
        source["format"] = known
    if columns := _columns(flat, key):
        source["columns"] = columns
    return source


def _columns(flat: dict[str, Any], key: str) -> dict[str, str]:
    wanted = {
        "field_messages": "messages", "field_instruction": "instruction", "field_output": "output", "field_input": "input",
        "field_system": "system", "field_chosen": "chosen", "field_rejected": "rejected", "field": "text", "text_column": "text",
    }  # fmt: skip
    role = str(flat.get("message_property_mappings.role", flat.get("message_field_role", "role")))
    found = {ours: str(flat[theirs]) for theirs, ours in wanted.items() if flat.get(theirs)}
    if role == "from" and "messages" in found:
        found["conversations"] = found.pop("messages")
    return {ours: theirs for ours, theirs in found.items() if ours != theirs and {ours, theirs} != {"messages", "conversations"}}


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the keys of inner mappings joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict) and key != "type":
            flat |= {f"{key}.{inner}": held for inner, held in value.items()}
        elif isinstance(value, dict):
            flat |= {f"{inner}": held for inner, held in value.items()} | {"type": {}}
        else:
            flat[key] = value
    return flat
