"""Trains an adapter, or every weight, on pairs of answers: DPO (arXiv:2305.18290), by TRL and PEFT.

Rows are tokenized by `tasks.data.masks`; of a conversation the last answer counts. The reference is the model as it begins: TRL
disables a new adapter, keeps a frozen copy of one that is continued, and gets a second model for `method: full`. A check before
the first step compares the two. A killed training resumes from its last complete checkpoint, on a CPU bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.data.masks import prompt_and_answer
from tasks.data.rows import Row
from tasks.models.loading import check_device, load_tokenizer
from tasks.training.answers import evaluated, evaluation_arguments, info, load, save_unchanged, train_and_save
from tasks.training.preferences import check_every_row_trained, check_lengths, check_moved, make_trainer, rows_of
from tuneline.errors import StageFailed
from tuneline.kinds.dpo import DpoStage
from tuneline.workspace.protocol import Events, Request, Result

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerState
    from trl import DPOConfig

# Figures of TRL's log that are emitted as events, by their name in events and metrics.
SHOWN = {
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "eval_rewards/margins": "eval_reward_margin",
    "eval_rewards/accuracies": "eval_reward_accuracy",
}


def run(request: Request, stage: DpoStage, events: Events) -> Result:
    from tasks.training import shared as training
    from tasks.training.dpo_trainer import PairTrainer

    check_device(stage)
    arguments = trainer_arguments(request, stage)  # first: with several GPUs this selects the process's own
    tokenizer = load_tokenizer(request.inputs.get("adapter") or request.inputs["model"])
    if arguments.process_index == 0:
        save_unchanged(request, stage, tokenizer, events)
    rows = rows_of(request, stage, tokenizer, "train", events)
    train, validation = tokenized(rows, tokenizer, stage.max_length, "train"), None
    if stage.eval_steps:
        validation = tokenized(rows_of(request, stage, tokenizer, "validation", events), tokenizer, stage.max_length, "validation")

    start = load(request, stage, tokenizer, train, validation)
    row_of = {
        tuple(prompt + answer): row.id
        for row, prompt, *answers in zip(rows, train["prompt_ids"], train["chosen_ids"], train["rejected_ids"], strict=True)
        for answer in answers
    }
    report = training.Report(events, lambda: [row_of[tokens] for tokens in trainer.step_rows()], SHOWN)
    trainer = make_trainer(PairTrainer, request, stage, arguments, start, report)
    state, sizes = train_and_save(trainer, request, stage, start, events)
    check_every_row_trained(len(train), state)
    check_moved(state.log_history, events)
    return Result(metrics=figures(state, stage) | sizes, info=info(start, report))


def trainer_arguments(request: Request, stage: DpoStage) -> DPOConfig:
    from trl import DPOConfig

    from tasks.training.shared import shared_arguments
    from tasks.training.strategies import sum_in_float32

    arguments = DPOConfig(
        **shared_arguments(request, stage),
        **evaluation_arguments(stage),
        gradient_checkpointing=False,  # `activation_checkpointing` is used instead
        max_length=None,  # longer rows are refused
        pad_to_multiple_of=None,
        activation_offloading=stage.resources.activation_offloading,
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        loss_type=[stage.loss_type, *(["sft"] if stage.rpo_alpha else [])],
        loss_weights=[1.0, *([stage.rpo_alpha] if stage.rpo_alpha else [])],
    )
    sum_in_float32(arguments)
    return arguments


def tokenized(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str) -> Dataset:
    """Return the rows as TRL's columns of token ids: prompt_ids, chosen_ids, rejected_ids."""
    from datasets import Dataset

    single = [row for row in rows if row.rejected is None]
    if single:
        message = f"{len(single)} of {len(rows)} {split} rows have no rejected answer, first row {single[0].id} of {single[0].source}"
        raise StageFailed("data", message, "`kind: kto` trains on single answers with a label, `kind: sft` on answers alone")
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row in rows:
        (prompt, chosen), (other_prompt, rejected) = (prompt_and_answer(each, tokenizer) for each in row.alternatives())
        if prompt != other_prompt:
            message = f"row {row.id}: the tokens of the prompt depend on the answer after it"
            raise StageFailed("data", message, "remove the row: its two answers cannot be compared")
        if chosen == rejected:
            message = f"row {row.id}: the two answers have the same tokens, because the chat template renders them alike"
            raise StageFailed("data", message, "remove the row")
        for name, ids in zip(columns, (prompt, chosen, rejected), strict=True):
            columns[name].append(ids)
    check_lengths(rows, columns, max_length, split)
    return Dataset.from_dict(columns)


def figures(state: TrainerState, stage: DpoStage) -> dict[str, float]:
    """Return the stage's metrics, from the history of all attempts."""
    from tasks.training.shared import mean_of_last

    history = state.log_history
    found = {
        "loss": mean_of_last(history, "loss"),
        "reward_margin": mean_of_last(history, "rewards/margins"),
        "reward_accuracy": mean_of_last(history, "rewards/accuracies"),
        "steps": state.global_step,
        "trained_pairs": sum(entry.get("rows", 0) for entry in history),
    }
    names = {"eval_loss": "eval_loss"} | {name: shown for name, shown in SHOWN.items() if name.startswith("eval_")}
    return found | {names.get(name, name): value for name, value in evaluated(state, stage, tuple(names)).items()}
