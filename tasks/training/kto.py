"""Trains an adapter, or every weight, on single answers that are labeled desirable or not: KTO (arXiv:2402.01306), by TRL and PEFT.

Rows are tokenized by `tasks.data.masks`; of a conversation the last answer counts, and a pair of answers is two rows. The reference is
the model as it begins, as in `tasks.training.dpo`. A killed training resumes from its last complete checkpoint, on a CPU bit for bit.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tasks.data.masks import prompt_and_answer
from tasks.data.rows import Row
from tasks.models.loading import check_device, load_tokenizer
from tasks.training.answers import evaluated, evaluation_arguments, info, lengths, load, save_unchanged, train_and_save
from tasks.training.preferences import check_every_row_trained, check_lengths, check_moved, make_trainer, rows_of
from tuneline.errors import StageFailed
from tuneline.kinds.kto import KtoStage
from tuneline.workspace.protocol import Events, Request, Result

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerState
    from trl import KTOConfig

# Figures of TRL's log that are emitted as events, by their name in events and metrics.
SHOWN = {
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_desirable",
    "rewards/rejected": "reward_undesirable",
    "kl": "kl",
    "eval_rewards/margins": "eval_reward_margin",
}


def run(request: Request, stage: KtoStage, events: Events) -> Result:
    from tasks.training import shared as training
    from tasks.training.kto_trainer import LabelTrainer

    check_device(stage)
    arguments = trainer_arguments(request, stage)  # first: with several GPUs this selects the process's own
    tokenizer = load_tokenizer(request.inputs.get("adapter") or request.inputs["model"])
    if arguments.process_index == 0:
        save_unchanged(request, stage, tokenizer, events)
    rows = labeled(rows_of(request, stage, tokenizer, "train", events), "train")
    train, validation = tokenized(rows, tokenizer, stage, "train"), None
    if stage.eval_steps:
        held_out = labeled(rows_of(request, stage, tokenizer, "validation", events), "validation")
        validation = tokenized(held_out, tokenizer, stage, "validation")
    if arguments.process_index == 0 and (advice := balance(train["label"], stage)):
        events.warning(advice)
    arguments.max_length = max(lengths(train) + (lengths(validation) if validation else []))  # cuts only answers of other prompts

    start = load(request, stage, tokenizer, train, validation)
    given = zip(rows, train["prompt_ids"], train["completion_ids"], strict=True)
    row_of = {tuple(prompt + answer): row.id for row, prompt, answer in given}
    report = training.Report(events, lambda: [row_of[tokens] for tokens in trainer.step_rows()], SHOWN)
    trainer = make_trainer(LabelTrainer, request, stage, arguments, start, report)
    state, sizes = train_and_save(trainer, request, stage, start, events)
    check_every_row_trained(len(train), state)
    check_moved(state.log_history, events)
    return Result(metrics=figures(state, stage) | sizes, info=info(start, report))


def trainer_arguments(request: Request, stage: KtoStage) -> KTOConfig:
    from trl import KTOConfig

    from tasks.training.shared import shared_arguments
    from tasks.training.strategies import sum_in_float32

    arguments = KTOConfig(
        **shared_arguments(request, stage),
        **evaluation_arguments(stage),
        gradient_checkpointing=False,  # `activation_checkpointing` is used instead
        pad_to_multiple_of=None,
        activation_offloading=stage.resources.activation_offloading,
        beta=stage.beta,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
        loss_type="apo_zero_unpaired",  # `LabelTrainer` sets it
        train_sampling_strategy="random",
    )
    sum_in_float32(arguments)
    return arguments


def labeled(rows: list[Row], split: str) -> list[Row]:
    """Return single answers with a label: of a pair, the chosen answer is desirable and the other one is not."""
    silent = [row for row in rows if row.rejected is None and row.label is None]
    if silent:
        first = f"{len(silent)} of {len(rows)} {split} rows have no label, first row {silent[0].id} of {silent[0].source}"
        hint = "give each row a column `label` or `kto_tag`, true or false, or the columns chosen and rejected"
        raise StageFailed("data", first, hint)
    found = []
    for row in rows:
        answers = row.alternatives()
        labels = (row.label,) if len(answers) == 1 else (True, False)
        found += [replace(answer, label=label) for answer, label in zip(answers, labels, strict=True)]
    return found


def tokenized(rows: list[Row], tokenizer: PreTrainedTokenizerBase, stage: KtoStage, split: str) -> Dataset:
    """Return the rows as TRL's columns: prompt_ids, completion_ids, label and, unless the loss has no use for it, KL_completion_ids, the
    answer of another prompt."""
    from datasets import Dataset

    prompts, answers = map(list, zip(*(prompt_and_answer(row, tokenizer) for row in rows), strict=True))
    columns: dict[str, list[Any]] = {"prompt_ids": prompts, "completion_ids": answers}
    check_lengths(rows, columns, stage.max_length, split)
    columns["label"] = [row.label for row in rows]
    if stage.loss_type == "kto":
        columns["KL_completion_ids"] = [answers[i] for i in others(prompts, stage.seed)]
    return Dataset.from_dict(columns)


def others(prompts: list[list[int]], seed: int) -> list[int]:
    """Return for each row the position of another row, drawn by the seed, with another prompt if there is one."""
    count = len(prompts)
    order = random.Random(seed).sample(range(count), count)
    found = [0] * count
    for place, row in enumerate(order):
        after = (order[(place + step) % count] for step in range(1, count))
        found[row] = next((other for other in after if prompts[other] != prompts[row]), order[(place + 1) % count])
    return found


def balance(labels: list[bool], stage: KtoStage) -> str | None:
    """Return a warning if the weighted numbers of desirable and undesirable answers are not in the paper's range, 1 to 4/3 (equation 8)."""
    desirable = sum(labels)
    undesirable = len(labels) - desirable
    if not desirable or not undesirable:
        return f"all {len(labels)} answers are {'desirable' if desirable else 'undesirable'}: the model learns no difference"
    share = desirable * stage.desirable_weight / (undesirable * stage.undesirable_weight)
    if 0.99 <= share <= 1.34:
        return None
    weight = undesirable * stage.undesirable_weight / desirable
    return (
        f"{desirable} desirable and {undesirable} undesirable answers: the paper recommends `desirable_weight` from {weight:.2f} to "
        f"{4 * weight / 3:.2f}"
    )


def figures(state: TrainerState, stage: KtoStage) -> dict[str, float]:
    """Return the stage's metrics, from the history of all attempts."""
    from tasks.training.shared import mean_of_last

    history = state.log_history
    shown = {name: SHOWN[name] for name in ("rewards/margins", "kl") if any(name in entry for entry in history)}
    found = {"loss": mean_of_last(history, "loss"), **{own: mean_of_last(history, name) for name, own in shown.items()}}
    found |= {"steps": state.global_step, "trained_rows": sum(entry.get("rows", 0) for entry in history)}
    names = {"eval_loss": "eval_loss"} | {name: own for name, own in SHOWN.items() if name.startswith("eval_")}
    names = {name: own for name, own in names.items() if any(name in entry for entry in history)}
    return found | {names.get(name, name): value for name, value in evaluated(state, stage, tuple(names)).items()} if names else found
