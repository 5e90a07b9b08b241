"""Fine-tunes a LoRA adapter, or every weight, on a Dataset's train split, by TRL and PEFT.

Rows are tokenized and masked by `tasks.data.masks`, not by TRL; a check ensures that TRL drops and truncates nothing. A killed
training resumes from its last complete checkpoint, on a CPU bit for bit. Micro-batches are flattened, not padded, and rows cannot see
one another, packed or not: each training checks this on its model (`tasks.training.flattening`).

`tasks.training.methods` holds the differences between methods. Left out: low-rank adapters on the head or the embeddings, grouping by
length beyond a step (`tasks.training.batches` says why).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.data import special_tokens
from tasks.data.masks import answers, answers_to_learn, sequences
from tasks.data.rendering import check_end
from tasks.data.rows import Row, read_split
from tasks.data.unrendered import complete, lost_in_training
from tasks.models import added_tokens
from tasks.models.loading import check_device, load_tokenizer
from tasks.training import methods
from tasks.training.answers import Start, evaluated, evaluation_arguments, info, lengths, load, save_unchanged, train_and_save
from tasks.training.frequencies import ALONE, check_frequencies
from tasks.training.head_checks import check_loss
from tasks.training.noise import add_noise
from tasks.training.sft_checks import check_every_row_trained, check_nothing_lost
from tuneline.errors import StageFailed
from tuneline.kinds.sft import LastAnswers, SftStage, Supervised
from tuneline.workspace.protocol import Events, Request, Result

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerState
    from trl import SFTConfig

    from tasks.training.sft_trainer import TokenWeightedTrainer
    from tasks.training.shared import Report


APART = "no single one holds every answer as it was asked for, because the chat template changes earlier turns of a longer conversation"


def run(request: Request, stage: Supervised, events: Events, loss_type: str = "nll") -> Result:
    """Train. `loss_type` is one of TRL's SFTConfig."""
    from tasks.training import shared as training

    check_device(stage)
    arguments = trainer_arguments(request, stage, loss_type)  # first: with several GPUs this selects the process's own
    base, earlier = request.inputs["model"], request.inputs.get("adapter")
    tokenizer = load_tokenizer(earlier or base)
    added = added_tokens.add(tokenizer, stage.add_tokens, known=earlier is not None)
    if arguments.process_index == 0:
        save_unchanged(request, stage, tokenizer, events)
    train, ids = tokenized(request, stage, tokenizer, "train", events)
    validation = tokenized(request, stage, tokenizer, "validation", events)[0] if stage.eval_steps else None
    if len(train) > (rows := len(set(ids))):
        events.warning(f"{rows} rows are trained as {len(train)} sequences: {APART}")

    start = load(request, stage, tokenizer, train, validation, added)
    row_of = dict(zip(map(tuple, train["input_ids"]), ids, strict=True))
    report = training.Report(events, lambda: [row_of[tokens] for tokens in trainer.step_rows()])
    trainer = make_trainer(request, stage, arguments, start, report)
    state, sizes = train_and_save(trainer, request, stage, start, events)
    check_every_row_trained(train, state)
    return Result(metrics=figures(state, stage) | sizes, info=info(start, report) | trainer.info)


def trainer_arguments(request: Request, stage: Supervised, loss_type: str = "nll") -> SFTConfig:
    from trl import SFTConfig

    from tasks.training.shared import shared_arguments
    from tasks.training.strategies import sum_in_float32

    arguments = SFTConfig(
        **shared_arguments(request, stage),
        # Rows are already tokenized, masked and packed; TRL only pads them, or joins packed ones with position ids.
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type=loss_type,
        max_length=stage.max_length,
        pad_to_multiple_of=stage.resources.sequence_parallel_size,
        packing=stage.packing,
        eval_packing=False,
        **evaluation_arguments(stage),
        label_smoothing_factor=stage.label_smoothing if isinstance(stage, SftStage) else 0.0,
        activation_offloading=stage.resources.activation_offloading,
    )
    sum_in_float32(arguments)
    return arguments


def make_trainer(request: Request, stage: Supervised, arguments: SFTConfig, start: Start, report: Report) -> TokenWeightedTrainer:
    """Build the trainer with all rows. Its checks run on the loaded rows now, and on the wrapped model before the first step."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from tasks.models import adapters
    from tasks.training import checkpoints, flattening, rank_allocation, sequences, strategies
    from tasks.training import shared as training
    from tasks.training.sft_trainer import TokenWeightedTrainer
    from tasks.training.trackers import Trackers

    if stage.packing or stage.micro_batch_size() > 1:
        for data in filter(None, (start.train, start.validation)):
            check_frequencies(start.model, lengths(data), "set `packing: false`" if stage.packing else ALONE)
    training.score_only_trained_tokens()
    if stage.neftune_noise_alpha:
        add_noise(start.model, stage.neftune_noise_alpha)
    base, earlier, settings, found = request.inputs["model"], request.inputs.get("adapter"), stage.adapter_settings(), start.targets
    callbacks = [report, Trackers(request, report.events), *([rank_allocation.AllocateRanks()] if stage.adalora else [])]
    callbacks.append(checkpoints.Checkpoints(request, stage.resources))
    if stage.early_stopping:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping.patience, stage.early_stopping.threshold))
    trainer = TokenWeightedTrainer(
        model=training.continued_adapter(start.model, earlier, base, settings, found) if earlier and found else start.model,
        args=arguments,
        train_dataset=packed(start.train, stage.max_length) if stage.packing else start.train,
        eval_dataset=start.validation,
        processing_class=start.tokenizer,
        # TRL sets the seed before it initializes the adapter.
        peft_config=adapters.configuration(settings, found, stage.max_steps) if found and not earlier else None,
        callbacks=callbacks,
        stage=stage,
    )
    trainer.remove_callback(PrinterCallback)  # events hold the same
    if stage.method == "qlora" or settings.modules_to_save:
        methods.adapter_in_float32(trainer.model, earlier)
    if stage.adalora:
        rank_allocation.freeze_divisors(trainer.model)
    if stage.add_tokens:
        added_tokens.show_bias(trainer.model)
    check_nothing_lost(start.train, trainer.train_dataset, trainer.data_collator)
    if start.validation:
        check_nothing_lost(start.validation, trainer.eval_dataset, trainer.data_collator)
    checks = [lambda: strategies.verify_strategy(trainer, stage.resources), lambda: check_loss(trainer, start.train[0]["input_ids"])]
    if stage.resources.sequence_parallel_size > 1:
        sequences.share(start.model, stage.resources, stage.micro_batch_size())
        checks.append(lambda: sequences.check(trainer, stage.resources))
    checks.append(lambda: flattening.lay_out(trainer, stage))
    trainer.add_callback(training.RunOnTrainBegin(*checks))
    return trainer


def figures(state: TrainerState, stage: Supervised) -> dict[str, float]:
    """Return the stage's metrics, from the history of all attempts."""
    from tasks.training.shared import mean_of_last

    history = state.log_history
    found = {
        "loss": mean_of_last(history, "loss"),
        "steps": state.global_step,
        "trained_tokens": sum(entry.get("trained_tokens", 0) for entry in history),
    }
    return found | evaluated(state, stage, ("eval_loss",))


def tokenized(
    request: Request, stage: Supervised, tokenizer: PreTrainedTokenizerBase, split: str, events: Events
) -> tuple[Dataset, list[str]]:
    """Return a split as input ids and labels, and each sequence's row id. Raises StageFailed for rows that TRL would truncate or drop."""
    from datasets import Dataset

    rows = read_split(request.inputs["dataset"].path, split)
    if not rows:
        hint = "give the dataset stage a share for validation: `split: {validation: 0.05}`" if split == "validation" else "see its report"
        raise StageFailed("data", f"the dataset has no rows in its {split} split", hint)
    refuse_preferences(rows, split)
    special_tokens.refuse(rows, tokenizer)
    check_end(rows, tokenizer, stage.no_end)
    rows = complete(rows, tokenizer, stage.on_unrendered, events, lost_in_training)
    if stage.train_on not in ("assistant", "all"):
        rows = taught(rows, stage.train_on, split, events)
    found = [(row.id, tokens) for row in rows for tokens in sequences(row, tokenizer, stage.train_on)]
    long = [(row, len(tokens.input_ids)) for row, tokens in found if len(tokens.input_ids) > stage.max_length]
    if long:
        longest = max(length for _, length in long)
        raise StageFailed(
            "data",
            f"{len(dict(long))} of {len(rows)} {split} rows are longer than max_length {stage.max_length}: "
            f"row {long[0][0]} has {long[0][1]} tokens, the longest {longest}",
            f"set `max_length: {longest}` here, or `max_length: {stage.max_length}` in the dataset stage, which drops or cuts them",
        )
    # The first token of a row is never predicted, so a row that trains only that token counts for nothing.
    masked = list(dict.fromkeys(row for row, tokens in found if not any(tokens.trained[1:])))  # a row may be several sequences
    if masked:
        raise StageFailed(
            "data",
            f"{len(masked)} of {len(rows)} {split} rows, such as {masked[0]}, have no token to train on "
            f"with `train_on: {shown(stage.train_on)}`",
            "remove rows without an answer from the dataset, or set `train_on: all`",
        )
    columns = {"input_ids": [tokens.input_ids for _, tokens in found], "labels": [tokens.labels for _, tokens in found]}
    return Dataset.from_dict(columns), [row for row, _ in found]


def refuse_preferences(rows: list[Row], split: str) -> None:
    """Raises StageFailed(data) for answers that nobody wants to be learned."""
    pairs, unwanted = [row for row in rows if row.rejected is not None], [row for row in rows if row.label is False]
    if pairs:
        raise StageFailed(
            "data",
            f"{len(pairs)} of {len(rows)} {split} rows have a rejected answer beside the chosen one, first row {pairs[0].id}",
            "`kind: dpo` trains on both; to train on chosen answers, set `format: messages` and `columns: {messages: chosen}` in the "
            "source (`format: prompt_completion` and `columns: {completion: chosen}` if they are text)",
        )
    if unwanted:
        message = f"{len(unwanted)} of {len(rows)} {split} rows have the label false, first row {unwanted[0].id}"
        raise StageFailed("data", message, "`kind: kto` trains on labels; to train on wanted answers, leave out the others")


def taught(rows: list[Row], train_on: str | LastAnswers, split: str, events: Events) -> list[Row]:
    """Return the rows with an answer to train on: those in which not all of the last ones that `train_on` wants have weight 0."""
    silent = [row for row in rows if row.messages is not None and answers(row) and not answers_to_learn(row, train_on)]
    if not silent:
        return rows
    setting, ends = f"`train_on: {shown(train_on)}`", "an answer" if train_on == "completion" else "answers"
    what = f"{len(silent)} of {len(rows)} {split} rows end with {ends} of weight 0, for example row {silent[0].id}"
    if len(silent) == len(rows):
        raise StageFailed("data", f"{what}: with {setting} no row is left", "set `train_on: assistant`: it trains earlier answers")
    events.warning(f"{what}: with {setting} they are left out")
    left_out = {row.id for row in silent}
    return [row for row in rows if row.id not in left_out]


def shown(train_on: str | LastAnswers) -> str:
    return f"{{last: {train_on.last}}}" if isinstance(train_on, LastAnswers) else train_on


def packed(dataset: Dataset, length: int) -> Dataset:
    """Join rows into sequences of up to `length` tokens, without splitting any."""
    from datasets import disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    return pack_dataset(dataset, length, strategy="bfd")
