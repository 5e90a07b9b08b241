"""Trains a LoRA adapter by reinforcement learning with verifiable rewards: GRPO (arXiv:2402.03300), by TRL and PEFT.

Each step samples several completions for each of a few prompts, scores them, and makes the better ones of each group more likely.
Prompts are tokenized by `tasks.data.masks`, as in every other stage. Completions come from the model itself, or from vLLM
(`tasks.training.rollouts`), which gets every new adapter and is checked to sample from it. A killed training resumes from its last
complete checkpoint, with that checkpoint's adapter.

Left out: tools and several turns, reward models, corrections for an engine whose rounding differs from the trainer's (the
difference is measured and bounded instead), images and QLoRA.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tasks.data import special_tokens
from tasks.data.masks import prompt_ids, with_reference
from tasks.data.rendering import check_end, ends, prompt_text
from tasks.data.rows import Row, read_split
from tasks.data.unrendered import complete, lost_in_asking
from tasks.models.loading import check_device, compute_type, load_tokenizer, save_tokenizer, saved_tokenizer, template_hash
from tasks.scoring.rewards import check_rows, reward_functions
from tasks.training.frequencies import check_frequencies
from tasks.training.head_checks import check_log_probs
from tuneline.errors import StageFailed
from tuneline.estimates.architectures import reach
from tuneline.kinds.grpo import GrpoStage
from tuneline.workspace.file_names import ROLLOUTS
from tuneline.workspace.protocol import Events, Input, Request, Result

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig


# Metrics of TRL's log, by their name in events; `shown_metrics` adds those of each reward.
SHOWN = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "groups_without_signal",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated",
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio/region_mean": "clipped",
    "freshness_max_logprob_diff": "freshness_max_logprob_diff",
    "sync_seconds": "sync_seconds",
}


def run(request: Request, stage: GrpoStage, events: Events) -> Result:
    from transformers import PrinterCallback

    from tasks.models import adapters, targets
    from tasks.training import checkpoints, strategies
    from tasks.training import shared as training
    from tasks.training.grpo_trainer import AdapterTrainer
    from tasks.training.trackers import Trackers

    rewards = reward_functions(stage.rewards, request.files)  # first: an error in a user's file should show at once
    gpus = split_devices(stage)
    check_device(stage)
    arguments = trainer_arguments(request, stage)
    base, earlier = request.inputs["model"], request.inputs.get("adapter")
    tokenizer = load_tokenizer(earlier or base)
    if arguments.process_index == 0:  # no training changes it, so check it first
        save_tokenizer(tokenizer, request.payload)
        saved_tokenizer(tokenizer, Input(path=request.payload, digest="", type="Adapter"))
    rows = readable_rows(request, stage, tokenizer, events)
    check_rows(rewards, rows)
    rows, prompts = tokenized(rows, tokenizer, events)
    check_enough(prompts, stage)

    model = strategies.load_base(base, stage, compute_type(stage))
    model.generation_config.eos_token_id = ends(tokenizer, model.generation_config.eos_token_id)  # TRL and vLLM stop at these tokens
    longest = check_lengths(rows, prompts, stage, reach(model.config.get_text_config().to_dict()))
    check_frequencies(model, [*map(len, prompts.values()), longest], "lower max_completion_length")
    found = targets.adapted(model, stage.lora)
    if arguments.process_index == 0:
        for warning in targets.warnings(model, found, stage.lora):
            events.warning(warning)
    with ExitStack() as stack:
        rollouts = None
        if stage.uses_engine():
            from tasks.training.rollouts import start

            os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns that `rollout_func` may change, but the lock pins TRL
            rollouts = stack.enter_context(start(request, stage, found, longest, gpus, events))
        training.score_only_trained_tokens()
        report = training.Report(events, lambda: [row.id for row in trainer.step_rows()], shown_metrics(stage), "reward")
        trainer = AdapterTrainer(
            model=training.continued_adapter(model, earlier, base, stage.lora, found) if earlier else model,
            args=arguments,
            reward_funcs=rewards,
            train_dataset=as_dataset(rows, prompts),
            processing_class=tokenizer,
            peft_config=None if earlier else adapters.configuration(stage.lora, found),  # TRL sets the seed before it draws the adapter
            callbacks=[report, Trackers(request, events), checkpoints.Checkpoints(request, stage.resources, stage.num_iterations)],
            rollout_func=rollouts,
            stage=stage,
            prompts=prompts,
            rows=dict(zip(prompts, rows, strict=True)),
            samples=request.work / ROLLOUTS,
            events=events,
        )
        trainer.remove_callback(PrinterCallback)  # events hold the same
        trainer.add_callback(
            training.RunOnTrainBegin(lambda: strategies.verify_strategy(trainer, stage.resources), lambda: check_log_probs(trainer))
        )
        before = training.adapter_tensors(trainer.model)
        training.check_before(trainer.model, stage.lora, found, before)
        trainable, parameters = trainer.model.get_nb_trainable_parameters()
        state, ended = checkpoints.train_to_end(trainer, request, stage.resources, events)
        if ended:
            checkpoints.load_adapter(trainer.model, ended)

    history = state.log_history
    check_signal(history)
    after = training.adapter_tensors(trainer.model)
    if arguments.process_index == 0:
        training.save_history(history, request.meta)
        shutil.copy(request.work / ROLLOUTS, request.meta / ROLLOUTS)
        training.save_adapter(trainer.model, after, request.payload, base, stage.lora)
        training.check_adapter(request.payload, stage.lora, found, before, events)
    info = {"template": template_hash(tokenizer), "dtype": str(model.dtype), "tokens_per_second": round(report.tokens_per_second, 1)}
    info["attention"] = model.config._attn_implementation
    metrics = figures(history, stage) | {"trainable_parameters": trainable, "all_parameters": parameters}
    return Result(metrics=metrics, info=info | (rollouts.facts() if rollouts else {}))


def shown_metrics(stage: GrpoStage) -> dict[str, str]:
    """Return the metrics of TRL's log that are emitted as events, by their name in events."""
    means = {f"rewards/{reward.label}/mean": f"reward/{reward.label}" for reward in stage.rewards}
    return SHOWN | means | {f"rewards/{reward.label}/std": f"reward_std/{reward.label}" for reward in stage.rewards}


def trainer_arguments(request: Request, stage: GrpoStage) -> GRPOConfig:
    from trl import GRPOConfig

    from tasks.training.checkpoints import checkpoint_steps
    from tasks.training.shared import shared_arguments

    # Completions are sampled again after a resume: a checkpoint in the middle of their iterations would change them.
    every = -(-checkpoint_steps(stage.resources) // stage.num_iterations) * stage.num_iterations
    return GRPOConfig(
        **shared_arguments(request, stage),
        gradient_checkpointing=False,  # `activation_checkpointing` is used instead
        num_generations=stage.num_generations,
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
        max_completion_length=stage.max_completion_length,
        mask_truncated_completions=stage.mask_truncated_completions,
        beta=stage.beta,
        epsilon=stage.epsilon,
        epsilon_high=stage.epsilon_high,
        loss_type=stage.loss_type,
        importance_sampling_level=stage.importance_sampling_level,
        scale_rewards=stage.scale_rewards,
        num_iterations=stage.num_iterations,
        reward_weights=[reward.weight for reward in stage.rewards],
        save_steps=every,
    )


def split_devices(stage: GrpoStage) -> list[str] | None:
    """Return the GPUs of the engine: its own, else the first one, which it shares; None on a CPU. Hides its own
    from this process. Must run before torch initializes CUDA."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not stage.resources.gpus:
        return None
    if not stage.uses_engine() or not (own := stage.resources.engine.gpus if stage.resources.engine else 0):
        return devices[:1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:-own])
    return devices[-own:]


def readable_rows(request: Request, stage: GrpoStage, tokenizer: PreTrainedTokenizerBase, events: Events) -> list[Row]:
    """Return the train split with its references. Raises StageFailed for rows that the chat template does not render whole."""
    rows = read_split(request.inputs["dataset"].path, "train")
    special_tokens.refuse(rows, tokenizer)
    check_end(rows, tokenizer, stage.no_end)
    return [with_reference(row, tokenizer) for row in complete(rows, tokenizer, stage.on_unrendered, events, lost_in_asking)]


def tokenized(rows: list[Row], tokenizer: PreTrainedTokenizerBase, events: Events) -> tuple[list[Row], dict[str, list[int]]]:
    """Return the rows to ask, and each prompt's token ids by its text. Rows with the same prompt would be one group: the first is kept."""
    plain = [row.id for row in rows if row.messages is None and row.prompt is None]
    if plain:
        message = f"{len(plain)} of {len(rows)} train rows have no prompt, only text: for example row {plain[0]}"
        raise StageFailed("data", message, "add prompts")
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(prompt_text(row, tokenizer), row)
    if len(first) < len(rows):
        events.warning(f"{len(rows) - len(first)} of {len(rows)} train rows have the same prompt as another row, and are left out")
    return list(first.values()), {text: prompt_ids(row, tokenizer) for text, row in first.items()}


def as_dataset(rows: list[Row], prompts: dict[str, list[int]]) -> Dataset:
    """Build TRL's dataset: a row's columns beside its prompt. `extra` is JSON, because its fields differ between rows."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": list(prompts),
            "id": [row.id for row in rows],
            "answer": [row.answer for row in rows],
            "calls": [row.calls() for row in rows],
            "extra": [json.dumps(row.extra, sort_keys=True) for row in rows],
        }
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def check_enough(prompts: dict[str, list[int]], stage: GrpoStage) -> None:
    """Raises StageFailed(data) if the prompts do not fill a step: TRL would drop them all."""
    wanted = stage.global_batch_size // stage.num_generations
    if len(prompts) < wanted:
        message = f"found {len(prompts)} prompts in the train split, expected at least {wanted}, as many as in a step"
        raise StageFailed("data", message, "add rows, or lower global_batch_size")


def check_lengths(rows: list[Row], prompts: dict[str, list[int]], stage: GrpoStage, positions: float) -> int:
    """Return the tokens of the longest prompt plus completion. Raises StageFailed(data) if the model or the engine allow fewer."""
    engine = stage.resources.engine
    engines = engine.max_model_len if engine else None
    limits: dict[str, float | None] = {"resources.engine.max_model_len": engines, "the model's positions": positions}
    longest = 0
    for row, ids in zip(rows, prompts.values(), strict=True):
        whole = len(ids) + stage.max_completion_length
        longest = max(longest, whole)
        for name, limit in limits.items():
            if limit is not None and whole > limit:
                raise StageFailed(
                    "data",
                    f"the prompt of row {row.id} has {len(ids)} tokens, which with max_completion_length {stage.max_completion_length} "
                    f"is more than {name}, {limit:.0f}",
                    "raise or remove max_model_len"
                    if "max_model_len" in name and whole <= positions
                    else "lower max_completion_length, or drop long rows in the dataset stage: `max_length: ...`",
                )
    return longest


def check_signal(history: list[dict[str, Any]]) -> None:
    """Raises StageFailed(data) if every group's completions had equal rewards, so that nothing could be learned."""
    shares = [entry["frac_reward_zero_std"] for entry in history if "frac_reward_zero_std" in entry]
    if min(shares) == 1:
        reward = next(entry["reward"] for entry in history if "reward" in entry)
        raise StageFailed(
            "data",
            f"nothing was learned: in all {len(shares)} steps the completions of each group had the same reward (at first {reward:.3f})",
            "train with sft first, use an easier task, add a reward with intermediate values, or raise temperature or num_generations",
        )


def figures(history: list[dict[str, Any]], stage: GrpoStage) -> dict[str, float]:
    """Return the manifest's metrics. First and last rewards are means over ten steps, or over half of a short training."""
    from tasks.training.shared import RECENT, mean_of_last

    steps = [entry for entry in history if "reward" in entry]
    window = max(1, min(RECENT, len(steps) // 2))  # half of a short training
    first, last = steps[:window], steps[-window:]
    metrics = {
        "steps": float(history[-1]["step"]),
        "loss": mean_of_last(history, "loss"),
        "reward": sum(entry["reward"] for entry in last) / window,
        "reward_first": sum(entry["reward"] for entry in first) / window,
        "completion_length": mean_of_last(history, "completions/mean_length"),
        "truncated": mean_of_last(history, "completions/clipped_ratio"),
        "groups_without_signal": mean_of_last(history, "frac_reward_zero_std"),
        "entropy": mean_of_last(history, "entropy"),
    }
    metrics["reward_gain"] = metrics["reward"] - metrics["reward_first"]
    metrics |= {f"reward/{reward.label}": mean_of_last(history, f"rewards/{reward.label}/mean") for reward in stage.rewards}
    if stage.beta:
        metrics["kl"] = mean_of_last(history, "kl")
    if stage.uses_engine():
        metrics["freshness_max_logprob_diff"] = max(
            entry["freshness_max_logprob_diff"] for entry in steps if "freshness_max_logprob_diff" in entry
        )
        metrics["sync_seconds"] = mean_of_last(history, "sync_seconds")
        metrics["sync_bytes"] = mean_of_last(history, "sync_bytes")
    return metrics
