"""verl: Hydra's overrides of `verl.trainer.main_ppo` (grpo) and of its trainers for sft."""

from __future__ import annotations

from typing import Any

from tuneline.config.hints import repository
from tuneline.imports.huggingface import MEGATRON
from tuneline.imports.launch import drop_unused, note_environment, place_on_devices
from tuneline.imports.rl import SIGNATURE
from tuneline.imports.stages import begin_training, continue_adapter, write_evaluation, write_model, write_seed
from tuneline.imports.translation import Job, Launch, Translation, exists
from tuneline.imports.values import names, number
from tuneline.imports.verl_keys import ESTIMATORS, RL, RL_DEFAULTS, SFT, SFT_DEFAULTS, TRAINER, A, F, M, R


def translate(job: Job, earlier: dict[str, str]) -> Translation:
    """Translate one command's overrides."""
    translation = Translation(job)
    if job.action == "sft":
        return _sft(translation)
    estimator = str(translation.value("algorithm.adv_estimator", default="gae"))
    if estimator not in ESTIMATORS:
        found = f"found adv_estimator={estimator}, expected grpo"
        raise job.wrong(
            "algorithm.adv_estimator", found, "write `algorithm.adv_estimator=grpo`: tuneline has no critic and no other estimator"
        )
    write_model(translation, f"{M}path")
    begin_training(translation, "grpo", "algorithm.adv_estimator")
    translation.apply({**RL, **TRAINER}, RL_DEFAULTS)
    _devices(translation)
    _completions(translation)
    _rewards(translation)
    if translation.on(f"{A}use_kl_loss"):
        translation.write("train.beta", number(translation.value(f"{A}kl_loss_coef", default=0.001)), key=f"{A}use_kl_loss")
    translation.use(f"{A}use_kl_loss", f"{A}kl_loss_coef")
    continue_adapter(translation, earlier, f"{M}lora_adapter_path")
    _sources(translation, {"prompt": str(translation.value("data.prompt_key", default="prompt"))}, "prompt")
    translation.remarks.append("verl's files name the answer in `reward_model`: `columns: {answer: ...}` must name a column with its text")
    return translation


def _sft(translation: Translation) -> Translation:
    write_model(translation, "model.partial_pretrain")
    begin_training(translation, "sft", "model.partial_pretrain")
    rank = translation.value("model.lora_rank", default=0)
    translation.apply({**SFT, **TRAINER}, SFT_DEFAULTS)
    _devices(translation)
    if isinstance(rank, int) and rank > 0:
        translation.write("train.lora.r", rank, key="model.lora_rank")
    else:
        translation.write("train.method", "full", "lora_rank 0 trains all weights")
        translation.parts["train"].pop("lora", None)
        translation.use("model.lora_rank")
    columns = {"prompt": str(translation.value("data.prompt_key", default="question"))}
    columns["completion"] = str(translation.value("data.response_key", default="answer"))
    multi = translation.on("data.multiturn.enable")
    translation.use("data.multiturn.enable")
    _sources(translation, {} if multi else columns, "messages" if multi else "prompt_completion")
    return translation


def _devices(translation: Translation) -> None:
    counts = [translation.value(key, default=least) for key, least in (("trainer.n_gpus_per_node", 8), ("trainer.nnodes", 1))]
    gpus, nodes = (count if isinstance(count, int) and 0 < count < 10_000 else 1 for count in counts)
    translation.job.launch = Launch(gpus, (), gpus, nodes)
    place_on_devices(translation)
    translation.use("trainer.n_gpus_per_node", "trainer.nnodes")
    strategy, offload = str(translation.value(f"{A}strategy", default="fsdp")), translation.on(f"{F}param_offload", f"{F}optimizer_offload")
    if translation.parts["train"]["kind"] == "grpo":
        translation.write("train.resources.strategy", "zero2", "verl's FSDP shards for training; zero2 is what runs with rollouts by vLLM")
        if offload:
            translation.write("train.resources.offload", "optimizer")
        translation.use(f"{F}param_offload", f"{F}optimizer_offload")
        if strategy in ("fsdp", "fsdp2"):
            translation.use(f"{A}strategy")
        else:
            translation.note(f"{A}strategy", MEGATRON)
    if translation.job.action == "sft":
        write_seed(translation, 1)
    drop_unused(translation)
    note_environment(translation)


def _completions(translation: Translation) -> None:
    """Write the completions per step: prompts per optimizer step x completions per prompt."""
    prompts = translation.value(f"{A}ppo_mini_batch_size", default=256)
    sampled, group = translation.value("data.train_batch_size", default=1024), translation.value(f"{R}n", default=1)
    if not all(isinstance(value, int) and value > 0 for value in (prompts, sampled, group)):
        return
    prompts = min(prompts, sampled)
    translation.write("train.global_batch_size", prompts * group, f"{prompts} prompts x {group} completions", key=f"{A}ppo_mini_batch_size")
    translation.write("train.num_generations", group, key=f"{R}n")
    translation.use("data.train_batch_size")
    if sampled > prompts:
        translation.remarks.append(
            f"verl trains {sampled // prompts} steps on {sampled} prompts sampled at once; here every step samples its own {prompts}"
        )
    micro = translation.value(f"{A}ppo_micro_batch_size_per_gpu", f"{A}ppo_micro_batch_size")
    if isinstance(micro, int) and micro > 0:
        gpus = translation.parts["train"]["resources"]["gpus"]
        each_gpu = micro if f"{A}ppo_micro_batch_size_per_gpu" in translation.job.given else max(1, micro // gpus)
        translation.write("train.resources.micro_batch_size", each_gpu)
        translation.use(f"{A}ppo_micro_batch_size_per_gpu", f"{A}ppo_micro_batch_size")


def _rewards(translation: Translation) -> None:
    file = translation.value("custom_reward_function.path")
    if isinstance(file, str) and file:
        name = str(translation.value("custom_reward_function.name", default="compute_score"))
        translation.write("train.rewards", [{"file": translation.local(file), "function": name}], key="custom_reward_function.path")
        translation.use("custom_reward_function.name")
        translation.remarks.append(f"the reward `{name}` must be a function of tuneline: {SIGNATURE}")
    else:
        translation.write("train.rewards", [{"type": "math_equal"}], "verl chooses by the rows' data_source: check it")
    translation.use("reward_model.reward_manager")


def _sources(translation: Translation, columns: dict[str, str], form: str) -> None:
    """Write the sources: parquet files."""
    files = names(translation.value("data.train_files", default=[]))
    renamed = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    more: dict[str, Any] = {"format": form} | ({"columns": renamed} if renamed else {})
    limit = translation.value("data.train_max_samples")
    more |= {"max_rows": limit} if isinstance(limit, int) and limit > 0 else {}
    translation.use("data.train_files", "data.prompt_key", "data.response_key", "data.train_max_samples")
    if not files:
        raise translation.job.wrong("data.train_files", "found no data.train_files, expected one or more files", "name them in the source")
    translation.write("data.sources", [_source(translation, file, more) for file in files], key="data.train_files")
    more.pop("max_rows", None)
    if held_out := names(translation.value("data.val_files", default=[])):
        write_evaluation(translation, [_source(translation, file, more) for file in held_out], "data.val_files")


def _source(translation: Translation, file: str, more: dict[str, Any]) -> dict[str, Any]:
    hub = None if exists(translation.job.path(file)) else repository(file)
    return {"type": "hub", "repo": hub, **more} if hub else {"type": "files", "path": translation.local(file), **more}
