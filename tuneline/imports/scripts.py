"""Hand-written scripts: shell variables (`LORA_R=16`) and flags of a Python program, under the names of transformers, PEFT and TRL."""

from __future__ import annotations

from typing import Any

from tuneline.config.hints import repository
from tuneline.config.training_aliases import TEMPLATE
from tuneline.imports.fates import REMOVE, Joined, Refused, Table, Without, each, to
from tuneline.imports.huggingface import KEPT, LORA, NO_FIELD, SPEED, TRAINING
from tuneline.imports.launch import drop_unused, note_environment, place_on_devices, write_batch, write_deepspeed
from tuneline.imports.stages import (
    begin_training,
    finish_adapter,
    without_dropout,
    write_evaluation,
    write_model,
    write_schedule,
    write_validation,
)
from tuneline.imports.translation import Job, Translation, exists
from tuneline.imports.values import brain_float, names, number, true, whole

MODELS = ("model_path", "model_name_or_path", "base_model", "model_name", "model", "base_model_path", "model_id")
FILES = ("data_path", "dataset_path", "train_file", "train_data", "data_file", "dataset_name", "dataset", "data", "train_path")
MICRO = ("per_device_train_batch_size", "per_device_batch_size", "micro_batch_size", "batch_size", "train_batch_size")
STEPS = ("gradient_accumulation_steps", "grad_accum_steps", "gradient_accumulation", "grad_accum", "accumulation_steps")
HELD_OUT = ("eval_file", "val_file", "validation_file", "test_file", "eval_dataset", "eval_data_path", "val_data_path")
SHARES = ("val_size", "val_set_size", "validation_split", "val_ratio", "eval_ratio", "val_split")
GPUS = ("num_gpus", "n_gpus", "gpus", "nproc_per_node", "num_processes", "cuda_visible_devices", "nnodes")
TABLE: Table = {
    **TRAINING,
    **LORA,
    **each(" ".join(MODELS), Joined("base.hub")),
    **each(" ".join(FILES), Joined("data.sources")),
    **each(" ".join((*MICRO, *STEPS)), Joined("train.global_batch_size")),
    **each(" ".join(SHARES), Joined("data.split.validation")),
    **each(" ".join(GPUS), Joined("train.resources.gpus")),
    **each("load_in_4bit load_in_8bit use_qlora use_peft use_lora", Joined("train.method")),
    **each("lr", to("train.learning_rate", by=number)),
    **each("num_epochs epochs", to("train.num_train_epochs", by=number)),
    **each("max_length max_seq_length max_seq_len cutoff_len block_size model_max_length", to(
        "train.max_length", "data.max_length", by=whole)),
    **each("lr_scheduler scheduler", to("train.lr_scheduler_type", by=str)),
    **each("use_bf16", to("train.dtype", by=brain_float)),
    "packing": to("train.packing", by=true),
    "modules_to_save": to("train.lora.modules_to_save", by=names),
    "r": to("train.lora.r", by=whole),
    "alpha": to("train.lora.lora_alpha", by=number),
    "system_prompt": to("data.system", by=str),
    "trust_remote_code": to("base.trust_remote_code", by=true),
    "chat_template": Without(TEMPLATE.removeprefix(REMOVE)),
    **each(" ".join(HELD_OUT), Joined("evaluate.datasets")),
    **each("output_path save_dir log_dir logs_dir log_file work_dir", KEPT),
    **each("num_workers preprocessing_num_workers dataset_num_proc device device_map master_port", Without(SPEED)),
    **each("bias task_type", Without("an adapter of a causal language model, without biases, is what trains")),
    "dataset_config": NO_FIELD,
}  # fmt: skip


def translate(job: Job, earlier: dict[str, str]) -> Translation:
    """Translate one script. The defaults of its program are not known, so what it does not name has tuneline's."""
    translation = Translation(job)
    model = next((key for key in MODELS if translation.value(key)), "model_path")
    write_model(translation, model)
    begin_training(translation, "sft", model)
    translation.apply(TABLE, {})
    four, eight = translation.on("load_in_4bit", "use_qlora"), translation.on("load_in_8bit")
    if four or eight:
        translation.write("train.method", "qlora", key="load_in_4bit" if four else "load_in_8bit")
        if not four:
            translation.write("train.bits", 8)
    elif "lora" not in translation.parts["train"] and not translation.on("use_peft", "use_lora"):
        translation.write("train.method", "full", "the source names no adapter")
    translation.use("load_in_4bit", "load_in_8bit", "use_qlora", "use_peft", "use_lora")
    _batch(translation)
    _sources(translation)
    finish_adapter(translation)
    without_dropout(translation)
    translation.remarks.append("the program's own defaults are not in the source: what it does not name has tuneline's defaults")
    return translation


def _batch(translation: Translation) -> None:
    processes = place_on_devices(translation)
    translation.use(*GPUS)
    micro = next((key for key in MICRO if key in translation.job.given), "")
    steps = next((key for key in STEPS if key in translation.job.given), "")
    if micro:
        write_batch(translation, translation.value(micro), translation.value(steps, default=1), processes, (micro, steps))
        translation.use(micro, steps)
    if "deepspeed" in translation.job.given:
        write_deepspeed(translation, "deepspeed")
    if translation.value("fsdp"):
        translation.write("train.resources.strategy", "fsdp", key="fsdp")
    write_validation(translation, next((key for key in SHARES if key in translation.job.given), SHARES[0]))
    drop_unused(translation)
    write_schedule(translation)
    note_environment(translation)


def _sources(translation: Translation) -> None:
    key = next((key for key in FILES if translation.value(key)), FILES[0])
    found: list[dict[str, Any]] = []
    for named in names(translation.value(key, default=[])):
        hub = None if exists(translation.job.path(named)) else repository(named)
        found.append({"type": "hub", "repo": hub} if hub else {"type": "files", "path": translation.local(named)})
    if not found:
        known = ", ".join(name.upper() for name in FILES[:3])
        raise translation.job.wrong(key, f"found no data, expected a variable such as {known}", "name the file of the rows in the source")
    translation.write("data.sources", found, key=key)
    held_out = next((name for name in HELD_OUT if translation.value(name)), "")
    if files := names(translation.value(held_out, default=[])):
        write_evaluation(translation, [{"type": "files", "path": translation.local(file)} for file in files], held_out)
    for other in (*MODELS, *FILES):
        if other in translation.job.given and other not in translation.used:
            translation.note(other, Refused("another key names it already"))
