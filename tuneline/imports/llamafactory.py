"""LLaMA-Factory: `llamafactory-cli train FILE.yaml`, and `export`."""

from __future__ import annotations

from typing import Any

from tuneline.imports.fates import Joined, Refused, Without, each
from tuneline.imports.launch import drop_unused, note_environment, place_on_devices, write_batch, write_deepspeed
from tuneline.imports.llamafactory_data import file_or_hub, source_of
from tuneline.imports.llamafactory_keys import DEFAULTS, EXPORT_DEFAULTS, TABLE
from tuneline.imports.stages import (
    begin_training,
    continue_adapter,
    finish_adapter,
    is_true,
    without_dropout,
    write_evaluation,
    write_merge,
    write_model,
    write_schedule,
    write_seed,
    write_validation,
    write_weights,
)
from tuneline.imports.translation import Job, Ref, Translation
from tuneline.imports.values import names

KINDS = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto"}


def translate(job: Job, earlier: dict[str, str]) -> Translation:
    """Translate one file. `earlier`: training stages of the sources before it, by their output folders."""
    translation = Translation(job)
    if job.action == "export" or "export_dir" in job.given:
        return _export(translation, earlier)
    stage, method = translation.value("stage", default="sft"), translation.value("finetuning_type", default="lora")
    write_model(translation, "model_name_or_path")
    begin_training(translation, KINDS.get(stage, str(stage)), "stage")
    if method == "oft":
        translation.write("train.oft", {}, key="finetuning_type")
    elif method not in ("lora", "full"):
        translation.note("finetuning_type", Refused("write `method: lora`, qlora or full"))
    translation.use("finetuning_type")
    translation.apply(TABLE, {**DEFAULTS, **({"pref_beta": 0.1} if stage in ("dpo", "kto") else {})})
    _method(translation, method)
    _batch_and_rest(translation)
    continue_adapter(translation, earlier, "adapter_name_or_path")
    for named in names(translation.value("dataset", default="")):
        translation.parts["data"]["sources"].append(source_of(translation, named))
    if not translation.parts["data"]["sources"]:
        raise job.wrong("dataset", "found no dataset, expected `dataset: NAME`", "name the datasets in the source")
    translation.use("dataset", "dataset_dir", "max_samples")
    write_weights(translation, "interleave_probs")
    if held_out := names(translation.value("eval_dataset", default="")):
        write_evaluation(translation, [source_of(translation, named) for named in held_out], "eval_dataset")
    finish_adapter(translation)
    without_dropout(translation)
    return translation


def _method(translation: Translation, method: str) -> None:
    bits = translation.value("quantization_bit")
    by = str(translation.value("quantization_method", default="bnb")).lower()
    if bits in (4, 8) and method == "lora" and by in ("bnb", "bitsandbytes"):
        translation.write("train.method", "qlora", key="quantization_bit")
        if bits == 8:
            translation.write("train.bits", 8)
        translation.use("quantization_bit", "quantization_method")
    else:
        if method == "full":
            translation.write("train.method", "full", key="finetuning_type")
        for key in ("quantization_bit", "quantization_method"):
            if key in translation.job.given:
                translation.note(key, Refused("write `method: qlora` and `bits: 4` or 8, by bitsandbytes, with `finetuning_type: lora`"))
    lora = translation.parts["train"].get("lora")
    if method != "full" and isinstance(lora, dict) and "lora_alpha" not in lora:
        translation.write("train.lora.lora_alpha", 2 * lora.get("r", 8), "2 x rank, LLaMA-Factory's default")
    if "pissa_iter" in translation.job.given:
        steps = translation.value("pissa_iter")
        if translation.on("pissa_init") and isinstance(steps, int) and steps > 0:
            translation.write("train.lora.init_lora_weights", f"pissa_niter_{steps}", key="pissa_iter")
        translation.use("pissa_iter")


def _batch_and_rest(translation: Translation) -> None:
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    processes = place_on_devices(translation)
    write_batch(translation, translation.value(keys[0], default=8), translation.value(keys[1], default=1), processes, keys)
    translation.use(*keys)
    if "deepspeed" in translation.job.given:
        write_deepspeed(translation, "deepspeed")
    if translation.value("fsdp"):
        translation.write("train.resources.strategy", "fsdp", key="fsdp")
        translation.use("fsdp")
    write_validation(translation, "val_size")
    write_seed(translation, 42)
    drop_unused(translation)
    write_schedule(translation)
    packs = translation.value("packing", "neat_packing", default=translation.value("stage") == "pt")
    if is_true(packs) or translation.on("neat_packing"):
        translation.write("train.packing", True, key="packing")
    learned = "all" if translation.on("train_on_prompt") else "completion" if translation.on("mask_history") else ""
    if learned:
        translation.write("train.train_on", learned, key="mask_history")
    joined = ("packing", "neat_packing", "train_on_prompt", "mask_history", "create_new_adapter")
    translation.use(*joined)
    translation.remarks.append("LLaMA-Factory truncates rows longer than cutoff_len; here they are dropped and counted")
    note_environment(translation)


def _export(translation: Translation, earlier: dict[str, str]) -> Translation:
    bits, adapter = translation.value("export_quantization_bit"), translation.value("adapter_name_or_path")
    made_from: Any = Ref("base")
    if adapter:
        made_from = Ref(write_merge(translation, earlier, "adapter_name_or_path"))
        translation.note("model_name_or_path", Without("a merge finds the adapter's base model"))
    else:
        write_model(translation, "model_name_or_path")
    if bits:
        translation.begin("quantize", "quantize")
        translation.write("quantize.model", made_from)
        translation.begin("data", "dataset")
        named = str(translation.value("export_quantization_dataset", default="c4_demo"))
        translation.write("data.sources", [file_or_hub(translation, named)], key="export_quantization_dataset")
        translation.write("quantize.calibration", Ref("data"))
        translation.use("export_quantization_dataset")
    elif not adapter:
        hint = "nothing is left to do: a stage of kind `model` already is a model; import the export of an adapter, or a quantization"
        raise translation.job.wrong("export_dir", "found an export without an adapter and without quantization", hint)
    translation.apply({**TABLE, "model_name_or_path": Joined("base"), **each("stage finetuning_type", Without("an export does not train"))},
                      EXPORT_DEFAULTS)  # fmt: skip
    note_environment(translation)
    return translation
