"""Turns rows with two answers into tokens, and checks that a training on them compares what it should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data import special_tokens
from tasks.data.masks import prompt_and_answer
from tasks.data.rendering import check_end
from tasks.data.rows import Row, read_split
from tasks.data.unrendered import complete, lost_in_training
from tuneline.errors import StageFailed
from tuneline.kinds.preferences import PreferenceTraining
from tuneline.workspace.protocol import Events, Request

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def rows_of(request: Request, stage: PreferenceTraining, tokenizer: PreTrainedTokenizerBase, split: str, events: Events) -> list[Row]:
    """Return the rows of a split that the template renders completely."""
    rows = read_split(request.inputs["dataset"].path, split)
    if not rows:
        hint = "give the dataset stage a share for validation: `split: {validation: 0.05}`" if split == "validation" else "see its report"
        raise StageFailed("data", f"the dataset has no rows in its {split} split", hint)
    special_tokens.refuse(rows, tokenizer)
    check_end(rows, tokenizer, stage.no_end)
    return complete(rows, tokenizer, stage.on_unrendered, events, lost_in_training)


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


# --- checks of the trainer --------------------------------------------------------------------------------------------


def check_nothing_lost(given: Dataset, used: Any, collator: Any) -> None:
    """Raises StageFailed(bug) unless the trainer, and a batch that it makes, hold the tokens as given."""
    if used.column_names != given.column_names or used[:] != given[:]:
        raise StageFailed("bug", "the trainer has other rows or tokens than it was given", "please report this")
    rows = [used[i] for i in range(min(len(used), 4))]
    batch = collator(rows)
    answers = [name for name in given.column_names if name in ("chosen_ids", "rejected_ids", "completion_ids")]
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
        reference = torch.cat(tuple(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)))
        own = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
    if not reference.isfinite().all():
        raise StageFailed("data", "the reference's log-probabilities are not finite", "check the base model's weights, and the dtype")
    rounding = 0.02 if trainer.args.bf16 else 1e-4
    allowed = rounding * reference.abs() + 1e-3
    if trainer.state.global_step == 0 and ((own - reference).abs() > allowed).any():
        found = f"found log-probabilities of {reference.mean():.4f} in the reference, expected the model's own, {own.mean():.4f}"
        raise StageFailed(
            "bug", f"the reference is not the model before the training: {found}", "please report this, with the `lora:` fields"
        )


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
