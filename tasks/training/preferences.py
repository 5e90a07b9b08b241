"""What trainings on preferences share: their rows, a trainer with a reference, and the checks that it compares what it should."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.data import special_tokens
from tasks.data.rendering import check_end
from tasks.data.rows import Row, read_split
from tasks.data.unrendered import complete, lost_in_training
from tasks.training import methods
from tasks.training.answers import ANSWERS, Start
from tasks.training.frequencies import check_frequencies
from tasks.training.head_checks import check_loss
from tuneline.errors import StageFailed
from tuneline.kinds.preferences import PreferenceTraining
from tuneline.workspace.protocol import Events, Request

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerState

    from tasks.training.row_weighted import RowWeighted
    from tasks.training.shared import Report

AnyTrainer = TypeVar("AnyTrainer", bound="RowWeighted")
TRAINED = re.compile(r"\.default(?=\.|$)")  # PEFT's name of the adapter in that of a weight; TRL's reference is named `ref`


def rows_of(request: Request, stage: PreferenceTraining, tokenizer: PreTrainedTokenizerBase, split: str, events: Events) -> list[Row]:
    """Return the rows of a split that the template renders completely."""
    rows = read_split(request.inputs["dataset"].path, split)
    if not rows:
        hint = "give the dataset stage a share for validation: `split: {validation: 0.05}`" if split == "validation" else "see its report"
        raise StageFailed("data", f"the dataset has no rows in its {split} split", hint)
    special_tokens.refuse(rows, tokenizer)
    check_end(rows, tokenizer, stage.no_end)
    return complete(rows, tokenizer, stage.on_unrendered, events, lost_in_training)


def check_lengths(rows: list[Row], columns: dict[str, list[list[int]]], max_length: int, split: str) -> None:
    """Raises StageFailed(data) for rows that are too long: TRL would cut off their ends."""
    prompts, *answers = columns.values()
    found = [len(prompt) + max(map(len, each)) for prompt, *each in zip(prompts, *answers, strict=True)]
    long = [(row, length) for row, length in zip(rows, found, strict=True) if length > max_length]
    if long:
        longest = max(length for _, length in long)
        raise StageFailed(
            "data",
            f"{len(long)} of {len(rows)} {split} rows are longer than max_length {max_length}: "
            f"row {long[0][0].id} has {long[0][1]} tokens, the longest {longest}",
            f"set `max_length: {longest}` here, or `max_length: {max_length}` in the dataset stage, which drops them",
        )


# --- the trainer ------------------------------------------------------------------------------------------------------


def make_trainer(
    trainer_class: type[AnyTrainer], request: Request, stage: PreferenceTraining, arguments: Any, start: Start, report: Report
) -> AnyTrainer:
    """Build the trainer with all rows. Its checks run on the rows now, and on the wrapped model before the first step."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from tasks.models import adapters
    from tasks.training import checkpoints, strategies
    from tasks.training import shared as training
    from tasks.training.trackers import Trackers

    for data in filter(None, (start.train, start.validation)):
        columns = [name for name in ANSWERS if name in data.column_names]
        check_frequencies(start.model, [len(row["prompt_ids"]) + len(row[name]) for row in data for name in columns], "")
    training.score_only_trained_tokens()
    base, earlier, settings = request.inputs["model"], request.inputs.get("adapter"), stage.adapter_settings()
    callbacks = [report, Trackers(request, report.events), checkpoints.Checkpoints(request, stage.resources)]
    if stage.early_stopping:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping.patience, stage.early_stopping.threshold))
    trainer = trainer_class(
        model=training.continued_adapter(start.model, earlier, base, settings, start.targets) if earlier and start.targets else start.model,
        ref_model=methods.load_base(base, stage) if stage.copies_base() else None,
        args=arguments,
        train_dataset=start.train,
        eval_dataset=start.validation,
        processing_class=start.tokenizer,
        # TRL sets the seed before it initializes the adapter.
        peft_config=adapters.configuration(settings, start.targets) if start.targets and not earlier else None,
        callbacks=callbacks,
        stage=stage,
    )
    trainer.remove_callback(PrinterCallback)  # events hold the same
    trainer.lora_plus_ratio = stage.lora.lora_plus_ratio
    if stage.method == "qlora" or settings.modules_to_save:
        methods.adapter_in_float32(trainer.model, earlier)
    copy_to_reference(trainer.model)
    for given, used in ((start.train, trainer.train_dataset), (start.validation, trainer.eval_dataset)):
        if given:
            check_nothing_lost(given, used, trainer.data_collator)
    answer = next(name for name in ANSWERS if name in start.train.column_names)
    trainer.add_callback(
        training.RunOnTrainBegin(
            lambda: strategies.verify_strategy(trainer, stage.resources),
            lambda: check_loss(trainer, start.train[0]["prompt_ids"] + start.train[0][answer]),
            lambda: check_reference(trainer),
        )
    )
    return trainer


def copy_to_reference(model: Any) -> None:
    """Copy a continued adapter to TRL's reference adapter: TRL does not copy the vectors of VeRA and (IA)^3, whose names end in the
    adapter's."""
    import torch

    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if TRAINED.search(name) and (reference := weights.get(TRAINED.sub(".ref", name))) is not None:
                reference.copy_(weight)


# --- checks of the trainer --------------------------------------------------------------------------------------------


def check_nothing_lost(given: Dataset, used: Any, collator: Any) -> None:
    """Raises StageFailed(bug) unless the trainer, and a batch that it makes, hold the tokens as given."""
    if used.column_names != given.column_names or used[:] != given[:]:
        raise StageFailed("bug", "the trainer has other rows or tokens than it was given", "please report this")
    rows = [used[i] for i in range(min(len(used), 4))]
    batch = collator(rows)
    answers = [name for name in ANSWERS if name in given.column_names]
    expected = [row["prompt_ids"] + row[name] for name in answers for row in rows]
    found = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    trained = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    if found != expected or trained != [row[name] for name in answers for row in rows]:
        raise StageFailed("bug", "the trainer's batch has other tokens than the rows", "please report this")


def check_reference(trainer: Any) -> None:
    """Raises StageFailed unless the reference computes what it should, on the first rows: log-probabilities of its own logits, and, before
    the first step, those of the model, so that every implicit reward begins at 0."""
    import torch

    rows = [trainer.train_dataset[i] for i in range(min(2, len(trainer.train_dataset)))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        own = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        reference = torch.cat([each for each in found if each is not None])[: len(own)]  # KTO's also has answers of other prompts
    if not reference.isfinite().all():
        raise StageFailed("data", "the reference's log-probabilities are not finite", "check the base model's weights, and the dtype")
    rounding = 0.02 if trainer.args.bf16 else 1e-4
    allowed = rounding * reference.abs() + 1e-3
    if trainer.state.global_step == 0 and ((own - reference).abs() > allowed).any():
        message = f"found log-probabilities of {reference.mean():.4f} in the reference, expected the model's own, {own.mean():.4f}"
        raise StageFailed(
            "bug", f"the reference is not the model before the training: {message}", "please report this, with the `lora:` fields"
        )


def check_every_row_trained(rows: int, state: TrainerState) -> None:
    """Raises StageFailed(bug) unless each full epoch trained on every row."""
    wanted = int(state.epoch + 1e-6) * rows
    trained = sum(entry.get("rows", 0) for entry in state.log_history)
    if trained < wanted:
        raise StageFailed("bug", f"{state.epoch:.2f} epochs: found {trained:,} trained rows, expected {wanted:,} or more")


def check_moved(history: list[dict[str, float]], events: Events) -> None:
    """Raises StageFailed(data) unless the margins between chosen and rejected answers are finite, and have moved from 0; warns if they
    have fallen."""
    import math

    from tasks.training.shared import mean_of_last

    what = "the margin between chosen and rejected answers"
    margins = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
    broken = next((step for step, margin in enumerate(margins, 1) if not math.isfinite(margin)), None)
    if broken is not None:
        raise StageFailed("data", f"{what} is {margins[broken - 1]} at step {broken}", "lower learning_rate")
    if len(margins) > 1 and not any(margins[1:]):
        message = f"{what} stayed 0: the training changed nothing that they depend on"
        raise StageFailed("data", message, "raise learning_rate, or train other layers")
    if (last := mean_of_last(history, "rewards/margins")) < 0:
        events.warning(f"{what} fell to {last:.4f}: the model prefers rejected ones more than before")
