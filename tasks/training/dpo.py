"""Trains an adapter, or every weight, on pairs of answers: DPO (arXiv:2305.18290), by TRL and PEFT.

Rows are tokenized by `tasks.data.masks`; of a conversation the last answer counts. The reference is the model as it begins: TRL
disables a new adapter, keeps a frozen copy of one that is continued, and gets a second model for `method: full`. A check before
the first step compares the two. A killed training resumes from its last complete checkpoint, on a CPU bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.models.loading import check_device, load_tokenizer
from tasks.training import methods
from tasks.training.answers import Start, evaluated, evaluation_arguments, info, load, save_unchanged, train_and_save
from tasks.training.head_checks import check_loss
from tasks.training.pairs import check_moved, check_nothing_lost, check_reference, rows_of, tokenized
from tuneline.errors import StageFailed
from tuneline.kinds.dpo import DpoStage
from tuneline.workspace.protocol import Events, Request, Result

if TYPE_CHECKING:
    from transformers import TrainerState
    from trl import DPOConfig

    from tasks.training.dpo_trainer import PairTrainer
    from tasks.training.shared import Report

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
    trainer = make_trainer(request, stage, arguments, start, report)
    state, sizes = train_and_save(trainer, request, stage, start, events)
    check_every_pair_trained(len(train), state)
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
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        loss_type=[stage.loss_type, *(["sft"] if stage.rpo_alpha else [])],
        loss_weights=[1.0, *([stage.rpo_alpha] if stage.rpo_alpha else [])],
    )
    sum_in_float32(arguments)
    return arguments


def make_trainer(request: Request, stage: DpoStage, arguments: DPOConfig, start: Start, report: Report) -> PairTrainer:
    """Build the trainer with all rows. Its checks run on the rows now, and on the wrapped model before the first step."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from tasks.models import targets
    from tasks.training import checkpoints, strategies
    from tasks.training import shared as training
    from tasks.training.dpo_trainer import PairTrainer

    training.score_only_trained_tokens()
    base, earlier = request.inputs["model"], request.inputs.get("adapter")
    callbacks = [report, checkpoints.Checkpoints(request, stage.resources)]
    if stage.early_stopping:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping.patience, stage.early_stopping.threshold))
    trainer = PairTrainer(
        model=training.adapter_to_go_on_from(start.model, earlier, base, stage.lora, start.targets)
        if earlier and start.targets
        else start.model,
        ref_model=methods.load_base(base, stage) if stage.copies_base() else None,
        args=arguments,
        train_dataset=start.train,
        eval_dataset=start.validation,
        processing_class=start.tokenizer,
        # TRL sets the seed before it initializes the adapter.
        peft_config=targets.lora_config(stage.lora, start.targets) if start.targets and not earlier else None,
        callbacks=callbacks,
        resources=stage.resources,
    )
    trainer.remove_callback(PrinterCallback)  # events hold the same
    if stage.method == "qlora":
        methods.adapter_in_float32(trainer.model, earlier)
    for given, used in ((start.train, trainer.train_dataset), (start.validation, trainer.eval_dataset)):
        if given:
            check_nothing_lost(given, used, trainer.data_collator)
    trainer.add_callback(
        training.RunOnTrainBegin(
            lambda: strategies.verify_strategy(trainer, stage.resources),
            lambda: check_loss(trainer, start.train[0]["prompt_ids"] + start.train[0]["chosen_ids"]),
            lambda: check_reference(trainer),
        )
    )
    return trainer


def check_every_pair_trained(pairs: int, state: TrainerState) -> None:
    """Raises StageFailed(bug) unless each full epoch trained on every pair."""
    wanted = int(state.epoch + 1e-6) * pairs
    trained = sum(entry.get("pairs", 0) for entry in state.log_history)
    if trained < wanted:
        raise StageFailed("bug", f"{state.epoch:.2f} epochs: found {trained:,} trained pairs, expected {wanted:,} or more")


def figures(state: TrainerState, stage: DpoStage) -> dict[str, float]:
    """Return the stage's metrics, from the history of all attempts."""
    from tasks.training.shared import mean_of_last

    history = state.log_history
    found = {
        "loss": mean_of_last(history, "loss"),
        "reward_margin": mean_of_last(history, "rewards/margins"),
        "reward_accuracy": mean_of_last(history, "rewards/accuracies"),
        "steps": state.global_step,
        "trained_pairs": sum(entry.get("pairs", 0) for entry in history),
    }
    names = {"eval_loss": "eval_loss"} | {name: shown for name, shown in SHOWN.items() if name.startswith("eval_")}
    return found | {names.get(name, name): value for name, value in evaluated(state, stage, tuple(names)).items()}
