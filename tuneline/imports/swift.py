"""ms-swift: `swift sft | rlhf | pt | export`, of versions 3 (`--train_type`) and 4 (`--tuner_type`)."""

from __future__ import annotations

import re
from typing import Any

from tuneline.config.hints import is_path, repository
from tuneline.imports.fates import Refused, each, to
from tuneline.imports.launch import drop_unused, note_environment, place_on_devices, write_batch, write_deepspeed
from tuneline.imports.rl import fit_to_engine, whole_groups, write_engine, write_rewards
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
from tuneline.imports.swift_keys import DEFAULTS, GRPO, OTHER_TUNER, PREFERENCE, TABLE
from tuneline.imports.texts import read_text
from tuneline.imports.translation import Job, Ref, Translation, exists
from tuneline.imports.values import dtype, whole
from tuneline.kinds.sft import OTHER_ADAPTERS

METHODS = {"lora": "lora", "full": "full"}

HUBS = re.compile(r"(?P<hub>hf|ms|HF|MS)::")
LONGEST = 8192
"""What `max_length` becomes where ms-swift takes the model's own limit."""


def translate(job: Job, earlier: dict[str, str]) -> Translation:
    """Translate one command. `earlier`: training stages of the sources before it, by their output folders."""
    translation = Translation(job)
    if job.action == "export":
        return _export(translation, earlier)
    rl = job.action == "rlhf" or "rlhf_type" in job.given
    kind = str(translation.value("rlhf_type", default="dpo")) if rl else "sft"
    write_model(translation, "model")
    begin_training(translation, kind, "rlhf_type" if rl else "model")
    method = str(translation.value("tuner_type", "train_type", "sft_type", default="lora"))
    _method(translation, method)
    defaults = {**DEFAULTS, "learning_rate": 1e-5 if method == "full" else 1e-4}
    translation.apply(TABLE, defaults | (GRPO if kind == "grpo" else PREFERENCE if rl else {}))
    if kind == "grpo":
        _grpo(translation)
    else:
        _supervised(translation)
    _batch(translation, kind)
    _from_files(translation)
    continue_adapter(translation, earlier, "adapters")
    for named in _list(translation.value("dataset", default=[])):
        translation.parts["data"]["sources"] += _sources(translation, str(named))
    if not translation.parts["data"]["sources"]:
        raise job.wrong("dataset", "found no dataset, expected `--dataset`", "name the datasets in the source")
    translation.origins["data", "sources"] = "dataset"
    translation.use("dataset", "columns")
    write_weights(translation, "interleave_prob")
    if held_out := translation.value("val_dataset"):
        write_evaluation(translation, [source for named in _list(held_out) for source in _sources(translation, str(named))], "val_dataset")
    finish_adapter(translation)
    without_dropout(translation)
    note_environment(translation)
    return translation


def _from_files(translation: Translation) -> None:
    """Replace a system prompt, or a list of tokens, that names a file by the file's text, as ms-swift does."""
    named = translation.parts["data"].get("system")
    if isinstance(named, str) and len(named) < 300 and named.endswith((".txt", ".md")):
        file = translation.job.path(named)
        if exists(file):
            translation.write("data.system", read_text(file).strip())
        else:
            translation.missing.append(named)
    tokens = translation.parts["train"].get("add_tokens", [])
    files = [name for name in tokens if name.endswith(".txt") and exists(translation.job.path(name))]
    if files:
        read = [token for name in files for token in read_text(translation.job.path(name)).split()]
        translation.write("train.add_tokens", [*(token for token in tokens if token not in files), *read])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _method(translation: Translation, method: str) -> None:
    keys = ("tuner_type", "train_type", "sft_type")
    bits, by = translation.value("quant_bits"), translation.value("quant_method", default="bnb")
    if method in OTHER_ADAPTERS:
        translation.write(f"train.{method}", {})
        translation.use(*keys)
    elif method not in METHODS:
        for key in keys:
            if key in translation.job.given:
                translation.note(key, OTHER_TUNER)
    elif method == "lora" and bits in (4, 8) and by == "bnb":
        translation.write("train.method", "qlora", key="quant_bits")
        if bits == 8:
            translation.write("train.bits", 8, key="quant_bits")
        translation.use("quant_method", *keys)
    else:
        if method == "full":
            translation.write("train.method", "full")
        translation.use(*keys)
    for key in ("quant_bits", "quant_method"):
        if key in translation.job.given and key not in translation.used:
            translation.note(key, Refused("write `method: qlora` and `bits: 4` or 8, by bitsandbytes"))


def _supervised(translation: Translation) -> None:
    if translation.job.action == "pt":
        translation.write("train.train_on", "all", "`swift pt` trains on all tokens")
    elif "loss_scale" in translation.job.given:
        learned = {"default": "assistant", "last_round": "completion", "all": "all"}.get(str(translation.value("loss_scale")))
        if learned is None:
            translation.note("loss_scale", Refused("write `train_on: assistant`, completion or all"))
        else:
            translation.write("train.train_on", learned, key="loss_scale")
    if translation.lacks("train.max_length"):
        translation.write("train.max_length", LONGEST, "ms-swift takes the model's own limit; here a longer row is an error")
    else:
        translation.remarks.append("rows longer than max_length are dropped and counted, as by ms-swift's default")


def _grpo(translation: Translation) -> None:
    write_rewards(translation, "reward_funcs", translation.value("reward_weights"), _first(translation.value("external_plugins")))
    translation.use("reward_weights", "external_plugins")
    translation.parts["train"].pop("max_length", None)
    if translation.on("use_vllm"):
        write_engine(translation, "vllm_gpu_memory_utilization", "vllm_max_model_len")
    train = translation.parts["train"]
    if train.get("method"):
        given = train.pop("method")
        key = "quant_bits" if given == "qlora" else "tuner_type"
        translation.note(key, Refused("grpo trains a LoRA adapter on a base in full precision"))
    for key in ("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_max_model_len"):
        translation.use(key)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _batch(translation: Translation, kind: str) -> None:
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    processes = place_on_devices(translation, spread=True)
    micro = translation.value(keys[0], default=1)
    rows = micro * processes if isinstance(micro, int) and micro > 0 else processes
    follows = 1 if kind == "grpo" else max(1, -(-16 // rows))
    if keys[1] not in translation.job.given:
        why = "" if kind == "grpo" else ", for 16 rows per step"
        translation.remarks.append(f"gradient_accumulation_steps is {follows} by ms-swift's default{why}")
    write_batch(translation, micro, translation.value(keys[1], default=follows), processes, keys)
    translation.use(*keys)
    if "deepspeed" in translation.job.given:
        write_deepspeed(translation, "deepspeed")
    if translation.value("fsdp"):
        translation.write("train.resources.strategy", "fsdp", key="fsdp")
    fit_to_engine(translation)
    whole_groups(translation)
    write_validation(translation, "split_dataset_ratio")
    write_seed(translation, 42)
    drop_unused(translation)
    write_schedule(translation)


def _sources(translation: Translation, named: str) -> list[dict[str, Any]]:
    """Return the sources of `[hf::]NAME[:SUBSET/SUBSET][#ROWS]`."""
    rest = HUBS.sub("", named)
    name, _, rows = rest.partition("#") if not exists(translation.job.path(rest)) else (rest, "", "")
    name, _, subsets = name.partition(":") if not exists(translation.job.path(name)) else (name, "", "")
    columns = translation.value("columns")
    more: dict[str, Any] = {"max_rows": int(rows)} if rows.isdigit() else {}
    if isinstance(columns, dict) and columns:
        more["columns"] = {str(ours): str(theirs) for theirs, ours in columns.items()}
    if exists(translation.job.path(name)) or not (hub := repository(name)):
        if not is_path(name) and not exists(translation.job.path(name)):
            translation.remarks.append(f"`{name}` is a name of ms-swift's: write its repository or file")
        return [{"type": "files", "path": translation.local(name), **more}]
    if not (translation.on("use_hf") or named.lower().startswith("hf::")):
        translation.remarks.append(f"`{hub}` is on ModelScope: `repo` must be its name on the Hugging Face hub")
    return [{"type": "hub", "repo": hub, **({"subset": subset} if subset else {}), **more} for subset in subsets.split("/")]


def _export(translation: Translation, earlier: dict[str, str]) -> Translation:
    adapter, method = translation.value("adapters"), translation.value("quant_method")
    bits = translation.value("quant_bits")
    made_from: Any = Ref("base")
    if adapter:
        made_from = Ref(write_merge(translation, earlier, "adapters"))
        translation.use("merge_lora")
    else:
        write_model(translation, "model")
    if method or bits:
        if method not in ("gptq", "gptq_v2", None):
            raise translation.job.wrong(
                "quant_method", f"found `{method}`, expected gptq", "write `--quant_method gptq`: tuneline has GPTQ"
            )
        translation.begin("quantize", "quantize")
        translation.begin("data", "dataset")
        translation.write("quantize.model", made_from)
        translation.write("quantize.calibration", Ref("data"))
        translation.write("quantize.bits", whole(bits or 4), key="quant_bits")
        sources = [source for named in _list(translation.value("dataset", default=[])) for source in _sources(translation, str(named))]
        translation.write("data.sources", sources, key="dataset")
        translation.use("quant_method", "dataset")
    elif not is_true(translation.value("merge_lora", default=False)) or not adapter:
        found = "found an export that neither merges an adapter nor quantizes by GPTQ"
        raise translation.job.wrong(
            "to_ollama", found, "an artifact is a folder that vLLM and transformers load: `tuneline show` prints it"
        )
    table = {**TABLE, "max_length": to("quantize.max_length", by=whole)}
    translation.apply({**table, **each("torch_dtype", to("merge.dtype", by=dtype))}, {"quant_n_samples": 256} if method or bits else {})
    note_environment(translation)
    return translation
