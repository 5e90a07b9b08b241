"""Stages that every tool's training needs: the model, the dataset, the training with its validation, and what uses its adapter."""

from __future__ import annotations

import re
from typing import Any

from tuneline.config.hints import repository
from tuneline.config.other_tools import ABSENT_KINDS
from tuneline.config.spec import STAGES
from tuneline.imports.fates import Refused, Without
from tuneline.imports.launch import share
from tuneline.imports.translation import Ref, Translation, exists
from tuneline.imports.values import names, number, true, whole
from tuneline.kinds.other_adapters import AdaLora
from tuneline.kinds.sft import OTHER_ADAPTERS

SCHEDULE = {"min_lr_rate": "min_lr_ratio", "num_decay_steps": "lr_decay_steps", "power": "lr_power"}
ALONE = "import its training with it: `tuneline import TRAINING EXPORT`, or name a training stage of yours in `adapters:`"
EPOCHS = "write `eval_steps:` with a number of steps; an epoch has (rows of the train split) / global_batch_size steps"
QUANTIZED = re.compile(r"(gptq|awq|aqlm|int4|int8|fp8)", re.IGNORECASE)


def write_model(translation: Translation, key: str, role: str = "base") -> None:
    """Write the stage of the model that `key` names. Raises ConfigError if it names none."""
    named = translation.value(key)
    if not isinstance(named, str) or not named or "$" in named:
        hint = f"write the model's name or folder into the source under `{key}`"
        raise translation.job.wrong(key, f"found no model in `{key}`, expected `owner/name` or a folder", hint)
    translation.begin(role, "model")
    translation.use(key)
    local = exists(translation.job.path(named))
    if (hub := repository(named)) and not local:
        translation.write(f"{role}.hub", hub, key=key)
    else:
        translation.write(f"{role}.{'gguf' if named.endswith('.gguf') else 'path'}", translation.local(named), key=key)
    if QUANTIZED.search(named.rpartition("/")[2]):
        translation.remarks.append(
            f"`{named}` looks quantized: trainings take models in full precision and quantize them (`method: qlora`)"
        )


def begin_training(translation: Translation, kind: str, key: str) -> None:
    """Begin the training and its dataset, under our names. Raises ConfigError for a kind of training that tuneline lacks."""
    if kind not in STAGES:
        hint = ABSENT_KINDS.get(re.sub(r"[-_ ]", "", kind), "what trains is `sft`, on given answers, and `grpo`, on rewards")
        raise translation.job.wrong(key, f"found a training by `{kind}`, expected one of {', '.join(trainings())}", hint)
    translation.use(key)
    translation.parts["pipeline"] = {}
    translation.begin("data", "dataset")
    translation.begin("train", kind)
    translation.write("data.model", Ref("base"))
    translation.write("data.sources", [])
    translation.write("data.dedup", "none", f"{translation.job.tool} keeps duplicates")
    translation.write("data.split.test", 0, f"{translation.job.tool} trains on all rows but those for validation")
    translation.write("train.model", Ref("base"))
    translation.write("train.dataset", Ref("data"))


def trainings() -> list[str]:
    return [kind for kind, stage in STAGES.items() if getattr(stage, "trains", False)]


def write_seed(translation: Translation, default: int) -> None:
    """Write the default seed of a tool in the training and its dataset; both decide the order of rows."""
    for role in ("train", "data"):
        if "seed" not in translation.parts[role]:
            translation.write(f"{role}.seed", default, f"{translation.job.tool}'s default")


def write_validation(translation: Translation, share_key: str) -> None:
    """Write the validation split, and how often it is evaluated."""
    held = translation.value(share_key)
    try:
        validation = 0.0 if held is None else number(held)
        if validation and not 0 < validation < 1:
            translation.note(share_key, Refused("it is a number of rows: write a share, `split: {validation: 0.1}`"))
        elif share_key in translation.job.given:
            translation.use(share_key)
    except (ValueError, OverflowError):
        validation = 0.0
        translation.note(share_key, Refused("write `split: {validation: 0.1}` in the stage of kind `dataset`"))
    if 0 < validation < 1:
        translation.write("data.split.validation", share(validation), key=share_key)
    _write_eval_steps(translation, 0 < validation < 1)


def _write_eval_steps(translation: Translation, held_out: bool) -> None:
    strategies = [key for key in ("eval_strategy", "evaluation_strategy") if key in translation.job.given]
    strategy = str(translation.value(*strategies, default="steps")) if strategies else "steps"
    steps = translation.value("eval_steps")
    keys = [key for key in (*strategies, "eval_steps") if key in translation.job.given]
    try:
        count = whole(steps) if steps is not None else 500
    except (ValueError, OverflowError):
        count = 0
    if not held_out or strategy in ("no", "none", "False"):
        for key in keys:
            translation.note(key, Without("nothing is held out for validation"))
    elif strategy == "epoch" or count < 1:
        for key in keys:
            translation.note(key, Refused(EPOCHS))
    elif keys:
        translation.write("train.eval_steps", count, "" if steps is not None else "transformers' default", key=keys[-1])
        translation.use(*keys)


def write_evaluation(translation: Translation, sources: list[dict[str, Any]], key: str) -> None:
    """Write an evaluation of the trained model on files of their own. `key`: the key that names them."""
    train = translation.parts["train"]
    translation.begin("held-out", "dataset")
    translation.write("held-out.model", Ref("base"))
    translation.write("held-out.sources", sources, key=key)
    translation.write("held-out.dedup", "none")
    translation.write("held-out.split.test", 0.9, "most rows: a dataset always keeps some for training")
    translation.begin("evaluate", "evaluate")
    translation.write("evaluate.model", Ref("train"))
    translation.write("evaluate.datasets", [Ref("held-out")])
    if "max_completion_length" in train:
        translation.write("evaluate.max_new_tokens", train["max_completion_length"])
    if train.get("resources", {}).get("gpus"):
        translation.write("evaluate.resources.gpus", 1)


def write_weights(translation: Translation, key: str) -> None:
    """Write the weights of sources, if there is one for each. Our rows keep their number: a weight is a share of the train split."""
    sources = translation.parts["data"]["sources"]
    try:
        given = [number(name) for name in names(translation.value(key, default=[]))]
    except ValueError:
        return
    if len(given) == len(sources) > 1:
        for source, weight in zip(sources, given, strict=True):
            source["weight"] = weight
        translation.use(key)


def write_schedule(translation: Translation) -> None:
    """Write the arguments of a learning rate schedule, under our names."""
    given, key = translation.value("lr_scheduler_kwargs"), "lr_scheduler_kwargs"
    rate = translation.parts["train"].get("learning_rate")
    for name, value in given.items() if isinstance(given, dict) else ():
        if name in SCHEDULE and isinstance(value, int | float):
            translation.write(f"train.{SCHEDULE[name]}", value, key=key)
        elif name == "min_lr" and isinstance(value, int | float) and isinstance(rate, int | float):
            translation.write("train.min_lr_ratio", round(value / rate, 12), f"{value:g} of {rate:g}", key=key)
        else:
            translation.note(key, Refused("write `min_lr_ratio`, `lr_decay_steps` or `lr_power`"))


def without_dropout(translation: Translation, key: str = "lora_dropout") -> None:
    """Drop LoRA's dropout from a training that compares the model with itself."""
    train = translation.parts["train"]
    if train["kind"] != "sft" and train.get("lora", {}).pop("lora_dropout", 0):
        translation.note(key, Refused(f"{train['kind']} trains without dropout, which would make the model differ from itself"))


def finish_adapter(translation: Translation) -> None:
    """Drop LoRA's settings from a training of all weights, and from one of another adapter. AdaLoRA takes over those that it shares."""
    train = translation.parts["train"]
    if "adalora" in train:
        lora = train.pop("lora", {})
        train["adalora"] = {name: value for name, value in lora.items() if name in AdaLora.model_fields} | train["adalora"]
        if "lora_rank" in translation.job.given:
            translation.note("lora_rank", Without("AdaLoRA's ranks are init_r and target_r"))
    if (train.get("method") == "full" or train.keys() & set(OTHER_ADAPTERS)) and train.pop("lora", None):
        for key in [key for (role, field), key in translation.origins.items() if (role, field) == ("train", "lora")]:
            translation.note(key, Without("it has no effect with what is trained here"))


def trained_by(translation: Translation, earlier: dict[str, str], path: Any) -> str | None:
    """Return the earlier training stage whose output folder `path` is in; the only one if none fits."""
    named = str(path[0] if isinstance(path, list) and path else path).rstrip("/")
    for output, stage in earlier.items():
        if output and (named == output or named.startswith(f"{output}/")):
            return stage
    stages = list(dict.fromkeys(earlier.values()))
    if len(stages) == 1:
        translation.remarks.append(f"`{named}` is taken for the adapter of `{stages[0]}`, the only training that was imported with it")
        return stages[0]
    return None


def continue_adapter(translation: Translation, earlier: dict[str, str], key: str) -> None:
    """Write `adapter:` for a training that continues one."""
    path = translation.value(key)
    if path in (None, "", []):
        return
    stage = trained_by(translation, earlier, path)
    if stage is None:
        translation.note(key, Refused("tuneline reads no adapters from elsewhere: import the training that made it as well"))
        return
    translation.write("train.adapter", stage, key=key)
    translation.use(key)


def write_merge(translation: Translation, earlier: dict[str, str], key: str) -> str:
    """Begin the stage that merges the adapter under `key`; return its role. Raises ConfigError if no training of it is known."""
    stage = trained_by(translation, earlier, translation.value(key))
    if stage is None:
        found = "found an adapter without the training that made it, expected both"
        raise translation.job.wrong(key, found, ALONE)
    translation.begin("merge", "merge")
    translation.write("merge.adapters", [stage], key=key)
    translation.use(key)
    return "merge"


def is_true(value: Any) -> bool:
    try:
        return true(value)
    except ValueError:
        return False
