"""What trainings on answers share, whatever their loss: the base and its adapter, the end of the training, and the hand-over."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.data.endings import check_ends, save_configs
from tasks.models import added_tokens
from tasks.models.loading import code_files, save_tokenizer, saved_tokenizer, template_hash
from tasks.training import methods
from tuneline.errors import StageFailed
from tuneline.estimates.architectures import reach
from tuneline.kinds.sft import AnswerTraining
from tuneline.workspace.protocol import Events, Input, Request
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

    from tasks.models.targets import Targets
    from tasks.training.shared import Report


ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")  # columns of tokens after a prompt


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    targets: Targets | None
    """The weights that get an adapter; None for `method: full`."""
    train: Dataset
    validation: Dataset | None
    warnings: tuple[str, ...]
    attention: str
    """The base's implementation; flattened rows may get their own."""


def save_unchanged(request: Request, stage: AnswerTraining, tokenizer: PreTrainedTokenizerBase, events: Events) -> None:
    """Save what no training changes, so that a problem with it ends the stage before the first step."""
    base, payload, adapter = request.inputs["model"], request.payload, stage.method != "full"
    save_tokenizer(tokenizer, payload)
    if not adapter:
        for file in code_files(base):
            shutil.copyfile(file, payload / file.name)
        save_configs(model_folder(base.path), payload, None, tokenizer, events)
        check_ends(payload, tokenizer)
    saved_tokenizer(tokenizer, Input(path=payload, digest="", type="Adapter" if adapter else "Model"))


def load(
    request: Request,
    stage: AnswerTraining,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    added: list[int] | None = None,
) -> Start:
    """Load the base, and find the layers that get an adapter. `added`: ids of new tokens."""
    from tasks.models import targets

    model = methods.load_base(request.inputs["model"], stage)
    attention = model.config._attn_implementation
    check_positions([train, validation] if validation else [train], reach(model.config.get_text_config().to_dict()))
    settings = stage.adapter_settings()
    found = None if stage.method == "full" else targets.adapted(model, settings, stage.method == "qlora")
    if found and added:
        found = added_tokens.make_room(model, found, added, request.seed)
    warnings = tuple(targets.warnings(model, found, settings, stage.method == "qlora")) if found else ()
    return Start(model, tokenizer, found, train, validation, warnings, attention)


def lengths(rows: Dataset) -> list[int]:
    """Return the number of tokens of each row's longest sequence, with its prompt."""
    answers = [name for name in ANSWERS if name in rows.column_names]
    if not answers:
        return [len(ids) for ids in rows["input_ids"]]
    given = zip(rows["prompt_ids"], *(rows[name] for name in answers), strict=True)
    return [len(prompt) + max(map(len, each)) for prompt, *each in given]


def check_positions(splits: list[Dataset], positions: float) -> None:
    """Raises StageFailed(config) if a row is longer than the model's positions. TRL and LLaMA-Factory would train on it: learned
    positions end in an index error, RoPE continues where nothing was learned. grpo and evaluations refuse such rows, too."""
    longest = max(length for split in splits for length in lengths(split))
    if longest > positions:
        message = f"max_length: found rows of {longest} tokens, expected at most {positions:.0f}, the model's positions"
        hint = (
            f"`max_length: {positions:.0f}` in the dataset stage drops or truncates longer rows; or scale RoPE in the model's config.json"
        )
        raise StageFailed("config", message, hint)


def evaluation_arguments(stage: AnswerTraining) -> dict[str, Any]:
    """Return the arguments of a trainer that decide when it evaluates, and what it keeps."""
    from tasks.training.checkpoints import checkpoint_steps

    return {
        "eval_strategy": "steps" if stage.eval_steps else "no",
        "eval_steps": stage.eval_steps,
        # To keep the best, every evaluation writes a checkpoint: the best adapter must not depend on resources.
        "save_steps": stage.eval_steps if stage.keeps_best() else checkpoint_steps(stage.resources),
        "load_best_model_at_end": stage.keeps_best(),
        "metric_for_best_model": "eval_loss" if stage.keeps_best() else None,
        "greater_is_better": False if stage.keeps_best() else None,
    }


def train_and_save(
    trainer: Any, request: Request, stage: AnswerTraining, start: Start, events: Events
) -> tuple[TrainerState, dict[str, int]]:
    """Train and write the adapter or the model, with checks before and after. Returns the final state and the numbers of parameters."""
    from tasks.training import initial
    from tasks.training import shared as training

    base, found, first = request.inputs["model"], start.targets, trainer.args.process_index == 0
    settings = stage.adapter_settings()
    before = initial.begin(trainer, base, settings, found, start.train, request.work) if found else {}
    trainable, parameters = trainer.model.get_nb_trainable_parameters() if found else (methods.parameters(start.model),) * 2
    parameters -= sum(each.numel() for name, each in trainer.model.named_parameters() if ".ref." in f"{name}.")  # TRL's copy of an adapter
    sizes = {"trainable_parameters": trainable, "all_parameters": parameters}
    if first:
        for name, count in sizes.items():
            events.metric(name, count)
        for warning in start.warnings:
            events.warning(warning)
    state, after = trained_weights(trainer, request, stage, events)
    if first:
        training.save_history(state.log_history, request.meta)
        if found:
            before, after = (initial.as_saved(tensors, settings, request.work) for tensors in (before, after))
            training.save_adapter(trainer.model, after, request.payload, base, settings)
            training.check_adapter(request.payload, settings.as_saved(), found, before, events)
        else:
            methods.save_model(after, base, request.payload)
            methods.check_model(request.payload, base)
    return state, sizes


def trained_weights(trainer: Any, request: Request, stage: AnswerTraining, events: Events) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """Train, and return the final state and the trained weights, whole and by their saved names."""
    from tasks.training import checkpoints, rank_allocation
    from tasks.training import shared as training

    state, ended = checkpoints.train_to_end(trainer, request, stage.resources, events)
    if stage.method == "full":
        keep = trainer.args.process_index == 0
        return state, methods.weights_in(ended, trainer.model) if ended else methods.weights(trainer.model, keep)
    if ended:
        checkpoints.load_adapter(trainer.model, ended)
    if stage.adapter_settings().kind == "adalora":
        rank_allocation.drop_empty_ranks(trainer.model)
    return state, training.adapter_tensors(trainer.model)


def evaluated(state: TrainerState, stage: AnswerTraining, names: tuple[str, ...]) -> dict[str, float]:
    """Return these figures of the last evaluation, or of the best one if that is kept, and its step; the first decides."""
    entries = {entry["step"]: entry for entry in state.log_history if names[0] in entry}
    if not entries:
        return {}
    step = state.best_global_step if stage.keeps_best() else max(entries)
    return {name: entries[step][name] for name in names} | ({"best_step": step} if stage.keeps_best() else {})


def info(start: Start, report: Report) -> dict[str, Any]:
    model = {"dtype": str(start.model.dtype), "attention": start.attention}
    return {"template": template_hash(start.tokenizer), **model, "tokens_per_second": round(report.tokens_per_second, 1)}
