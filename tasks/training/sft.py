"""Fine-tunes a LoRA adapter, or every weight, on a Dataset's train split, by TRL and PEFT.

Rows are tokenized and masked by `tasks.data.masks`, not by TRL; a check ensures that TRL drops and truncates nothing. A killed
training resumes from its last complete checkpoint, on a CPU bit for bit. Packed rows cannot attend to one another: their position ids
start at 0, and transformers derives the mask from them (torch's sdpa is enough); each training checks this on its model.

`tasks.training.methods` holds the differences between methods. Left out: low-rank adapters on the head or the embeddings, grouping by
length beyond a step (`tasks.training.batches` says why).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.data import special_tokens
from tasks.data.endings import check_ends, save_configs
from tasks.data.masks import answers, answers_to_learn, sequences
from tasks.data.rendering import check_end
from tasks.data.rows import Row, read_split
from tasks.data.unrendered import complete, lost_in_training
from tasks.models import added_tokens
from tasks.models.loading import check_device, code_files, load_tokenizer, save_tokenizer, saved_tokenizer, template_hash
from tasks.training import methods
from tasks.training.head_checks import check_loss
from tasks.training.noise import add_noise
from tasks.training.sft_checks import check_every_row_trained, check_nothing_lost, check_positions, check_rows_apart
from tuneline.errors import StageFailed
from tuneline.estimates.architectures import reach
from tuneline.kinds.sft import LastAnswers, SftStage, Supervised
from tuneline.workspace.protocol import Events, Input, Request, Result
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
    from trl import SFTConfig

    from tasks.models.targets import Targets
    from tasks.training.sft_trainer import TokenWeightedTrainer
    from tasks.training.shared import Report


APART = "no single one holds every answer as it was asked for, because the chat template changes earlier turns of a longer conversation"


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    targets: Targets | None
    """The weights that get an adapter; None for `method: full`."""
    train: Dataset
    validation: Dataset | None


def run(request: Request, stage: Supervised, events: Events, loss_type: str = "nll") -> Result:
    """Train. `loss_type` is one of TRL's SFTConfig."""
    from tasks.models import targets
    from tasks.training import initial
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

    model = methods.load_base(base, stage)
    check_positions([train, validation] if validation else [train], reach(model.config.get_text_config().to_dict()))
    settings = stage.adapter_settings()
    found = None if stage.method == "full" else targets.adapted(model, settings, stage.method == "qlora")
    if found and added:
        found = added_tokens.make_room(model, found, added, request.seed)
    warnings = list(targets.warnings(model, found, settings, stage.method == "qlora")) if found else []
    row_of = dict(zip(map(tuple, train["input_ids"]), ids, strict=True))
    report = training.Report(events, lambda: [row_of[tokens] for tokens in trainer.step_rows()])
    trainer = make_trainer(request, stage, arguments, Start(model, tokenizer, found, train, validation), report)
    before = initial.begin(trainer, settings, found, train, request.work) if found else {}
    trainable, parameters = trainer.model.get_nb_trainable_parameters() if found else (methods.parameters(model),) * 2
    sizes = {"trainable_parameters": trainable, "all_parameters": parameters}
    if arguments.process_index == 0:
        for name, count in sizes.items():
            events.metric(name, count)
        for warning in warnings:
            events.warning(warning)

    state, after = trained_weights(trainer, request, stage, events)
    check_every_row_trained(train, state)
    if arguments.process_index == 0:
        training.save_history(state.log_history, request.meta)
        if found:
            before, after = (initial.as_saved(tensors, settings, request.work) for tensors in (before, after))
            training.save_adapter(trainer.model, after, request.payload, base, settings)
            training.check_adapter(request.payload, settings.as_saved(), found, before, events)
        else:
            methods.save_model(after, base, request.payload)
            methods.check_model(request.payload, base)
    info = {"template": template_hash(tokenizer), "dtype": str(model.dtype), "attention": model.config._attn_implementation}
    speed = {"tokens_per_second": round(report.tokens_per_second, 1)}
    return Result(metrics=figures(state, stage, sizes), info=info | speed)


def save_unchanged(request: Request, stage: Supervised, tokenizer: PreTrainedTokenizerBase, events: Events) -> None:
    """Save what no training changes, so that a problem with it ends the stage before the first step."""
    base, payload, adapter = request.inputs["model"], request.payload, stage.method != "full"
    save_tokenizer(tokenizer, payload)
    if not adapter:
        for file in code_files(base):
            shutil.copyfile(file, payload / file.name)
        save_configs(model_folder(base.path), payload, None, tokenizer, events)
        check_ends(payload, tokenizer)
    saved_tokenizer(tokenizer, Input(path=payload, digest="", type="Adapter" if adapter else "Model"))


def trainer_arguments(request: Request, stage: Supervised, loss_type: str = "nll") -> SFTConfig:
    from trl import SFTConfig

    from tasks.training.checkpoints import checkpoint_steps
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
        eval_strategy="steps" if stage.eval_steps else "no",
        eval_steps=stage.eval_steps,
        # To keep the best, every evaluation writes a checkpoint: the best adapter must not depend on resources.
        save_steps=stage.eval_steps if stage.keeps_best() else checkpoint_steps(stage.resources),
        load_best_model_at_end=stage.keeps_best(),
        metric_for_best_model="eval_loss" if stage.keeps_best() else None,
        greater_is_better=False if stage.keeps_best() else None,
        label_smoothing_factor=stage.label_smoothing if isinstance(stage, SftStage) else 0.0,
        activation_offloading=stage.resources.activation_offloading,
    )
    sum_in_float32(arguments)
    return arguments


def make_trainer(request: Request, stage: Supervised, arguments: SFTConfig, start: Start, report: Report) -> TokenWeightedTrainer:
    """Build the trainer with all rows. Its checks run on the loaded rows now, and on the wrapped model before the first step."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from tasks.models import adapters
    from tasks.training import checkpoints, sequences, strategies
    from tasks.training import shared as training
    from tasks.training.sft_trainer import TokenWeightedTrainer
    from tasks.training.trackers import Trackers

    training.score_only_trained_tokens()
    if stage.neftune_noise_alpha:
        add_noise(start.model, stage.neftune_noise_alpha)
    base, earlier = request.inputs["model"], request.inputs.get("adapter")
    callbacks = [report, Trackers(request, report.events), checkpoints.Checkpoints(request, stage.resources)]
    if stage.early_stopping:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping.patience, stage.early_stopping.threshold))
    trainer = TokenWeightedTrainer(
        model=training.continued_adapter(start.model, earlier, base, stage.adapter_settings(), start.targets)
        if earlier and start.targets
        else start.model,
        args=arguments,
        train_dataset=packed(start.train, stage.max_length) if stage.packing else start.train,
        eval_dataset=start.validation,
        processing_class=start.tokenizer,
        # TRL sets the seed before it initializes the adapter.
        peft_config=adapters.configuration(stage.adapter_settings(), start.targets) if start.targets and not earlier else None,
        callbacks=callbacks,
        stage=stage,
    )
    trainer.remove_callback(PrinterCallback)  # events hold the same
    trainer.lora_plus_ratio = stage.lora.lora_plus_ratio
    if stage.method == "qlora" or stage.adapter_settings().modules_to_save:
        methods.adapter_in_float32(trainer.model, earlier)
    if stage.add_tokens:
        added_tokens.show_bias(trainer.model)
    check_nothing_lost(start.train, trainer.train_dataset, trainer.data_collator)
    if start.validation:
        check_nothing_lost(start.validation, trainer.eval_dataset, trainer.data_collator)
    checks = [lambda: strategies.verify_strategy(trainer, stage.resources), lambda: check_loss(trainer)]
    if stage.resources.sequence_parallel_size > 1:
        sequences.share(start.model, stage.resources, stage.micro_batch_size())
        checks.append(lambda: sequences.check(trainer, stage.resources))
    if stage.packing:
        checks.append(lambda: check_rows_apart(trainer))
    trainer.add_callback(training.RunOnTrainBegin(*checks))
    return trainer


def trained_weights(
    trainer: TokenWeightedTrainer, request: Request, stage: Supervised, events: Events
) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """Train, and return the final state and the trained weights, whole and by their saved names."""
    from tasks.training import checkpoints
    from tasks.training import shared as training

    state, ended = checkpoints.train_to_end(trainer, request, stage.resources, events)
    if stage.method == "full":
        keep = trainer.args.process_index == 0
        return state, methods.weights_in(ended, trainer.model) if ended else methods.weights(trainer.model, keep)
    if ended:
        checkpoints.load_adapter(trainer.model, ended)
    return state, training.adapter_tensors(trainer.model)


def figures(state: TrainerState, stage: Supervised, sizes: dict[str, int]) -> dict[str, float]:
    """Return the stage's metrics, from the history of all attempts."""
    from tasks.training.shared import mean_of_last

    history = state.log_history
    found = {
        "loss": mean_of_last(history, "loss"),
        "steps": state.global_step,
        "trained_tokens": sum(entry.get("trained_tokens", 0) for entry in history),
        **sizes,
    }
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if stage.keeps_best():
        return found | {"eval_loss": evaluated[state.best_global_step], "best_step": state.best_global_step}
    return found | ({"eval_loss": evaluated[max(evaluated)]} if evaluated else {})


def tokenized(
    request: Request, stage: Supervised, tokenizer: PreTrainedTokenizerBase, split: str, events: Events
) -> tuple[Dataset, list[str]]:
    """Return a split as input ids and labels, and each sequence's row id. Raises StageFailed for rows that TRL would truncate or drop."""
    from datasets import Dataset

    rows = read_split(request.inputs["dataset"].path, split)
    if not rows:
        hint = "give the dataset stage a share for validation: `split: {validation: 0.05}`" if split == "validation" else "see its report"
        raise StageFailed("data", f"the dataset has no rows in its {split} split", hint)
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
