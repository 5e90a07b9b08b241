"""Holds what all trainings share: common arguments, adapters, events, and the checks of the saved adapter.

Imports torch, transformers and peft at the top because it subclasses them; programs import it inside `run`. Trainers are separate:
rows and losses differ between kinds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.models.adapters import check_form, compared, configuration, meant_by, saved_config
from tasks.models.loading import check_loaded, compute_type
from tasks.models.targets import Targets
from tasks.training import optimizers, strategies
from tuneline.errors import StageFailed
from tuneline.kinds.adapters import Places
from tuneline.kinds.training import Training
from tuneline.patches import patch
from tuneline.workspace.checkpoints import FOLDER
from tuneline.workspace.file_names import HISTORY
from tuneline.workspace.protocol import Events, Input, Request

UNCHECKED = (".lora_A.", ".lora_magnitude", "base_model.vera_")  # parts of an adapter that need not change
SHOWN_ROWS = 16  # in a message about a failed step
CPU_TILE = 2048  # entries of the vocabulary; TRL's 32,768 suit GPUs
RECENT = 10  # last steps, whose mean is a training's final loss


def shared_arguments(request: Request, stage: Training) -> dict[str, Any]:
    """Return the arguments of every trainer. The global batch does not depend on the number of devices or the micro-batch."""
    strategies.join_processes(stage.resources)
    micro = stage.micro_batch_size()
    return {
        "output_dir": str(request.work / FOLDER),
        "seed": request.seed,
        "data_seed": request.seed,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "warmup_steps": stage.warmup_steps,
        "weight_decay": stage.weight_decay,
        **optimizers.arguments(stage),
        "max_grad_norm": stage.max_grad_norm,
        "num_train_epochs": stage.num_train_epochs,
        "max_steps": stage.max_steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": stage.global_batch_size // (micro * stage.resources.data_parallel_size),
        "bf16": compute_type(stage) == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_timeout": stage.resources.collective_timeout,
        "save_strategy": "steps",
        "save_total_limit": stage.resources.checkpoints_kept,
        "restore_callback_states_from_checkpoint": True,
        # TRL would add the routers' balancing loss once per micro-batch, but the loss must not depend on micro-batches.
        "router_aux_loss_coef": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_liger_kernel": stage.resources.kernels == "liger",
        "torch_compile": stage.resources.compile,
        **strategies.arguments(stage.resources),
    }


# --- adapters ---------------------------------------------------------------------------------------------------------


def continued_adapter(model: PreTrainedModel, source: Input, base: Input, settings: Places, found: Targets) -> PeftModel:
    """Put the earlier adapter, trainable, on the model; only its dropout may change.

    Raises StageFailed(config) if it belongs to another base, or has another form than the stage configures.
    """
    if source.base is None or source.base.digest != base.digest:
        raise StageFailed("config", "adapter: found an adapter of another base model", "set `model:` to the base that it was trained on")
    config, wanted = PeftConfig.from_pretrained(source.path), configuration(settings, found)
    there, here = compared(config, settings), compared(wanted, settings)
    differences = [f"{name} {there[name]} instead of {here[name]}" for name in here if there[name] != here[name]]
    has, wants = meant_by(config, model), found.layers | found.parameters.keys()
    if has != wants:
        differences.append(f"target_modules that match {len(has)} layers instead of {len(wants)}")
    if differences:
        raise StageFailed(
            "config",
            f"adapter: found {'; '.join(differences)}",
            f"give this stage the `{settings.kind}:` of the one that made the adapter",
        )
    if dropout := settings.dropout_field:
        setattr(config, dropout, getattr(wanted, dropout))
    config.base_model_name_or_path = model.name_or_path  # PEFT reads the vocabulary's size there, else from the hub
    adapted = PeftModel.from_pretrained(model, source.path, config=config, is_trainable=True)
    check_loaded(adapted, source.path)
    return adapted


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copy the adapter's weights to the CPU, whole, by their saved names. Every process must call it: each may hold a part."""
    parameters = model.named_parameters(remove_duplicate=False)  # PEFT wants a tied weight under both names
    whole = {name: strategies.whole(parameter) for name, parameter in parameters if parameter.requires_grad}
    # VeRA's shared matrices are no parameters.
    whole |= {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False) if name.startswith("base_model.vera_")}
    state = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    return {strategies.unwrapped(name): tensor.contiguous() for name, tensor in sorted(state.items())}


def config_of(model: PeftModel) -> dict[str, Any]:
    config = model.peft_config["default"].to_dict()
    del config["peft_version"]
    return config  # type: ignore[no-any-return]


def save_adapter(model: PeftModel, tensors: dict[str, torch.Tensor], payload: Path, base: Input, settings: Places) -> None:
    """Write the adapter in the same way everywhere: sorted lists, and the base's digest instead of its path.

    PEFT's own `save_pretrained` writes sets in hash order, the base's path, and a README.
    """
    config = saved_config(config_of(model), settings) | {"base_model_name_or_path": f"tuneline:{base.digest}", "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (payload / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, payload / "adapter_model.safetensors", metadata={"format": "pt"})


def check_before(model: PeftModel, settings: Places, found: Targets, before: dict[str, torch.Tensor]) -> None:
    """Run the hand-over's checks of an adapter's form before the first step, so that no training ends with an error known at its start.
    Also checks that PEFT reads the weights back by their saved names."""
    check_form(config_of(model), before, settings, found)
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # under ZeRO-3 each process holds a part
        result = set_peft_model_state_dict(model, before)
        after = get_peft_model_state_dict(model, save_embedding_layers=False)
        wrong = sorted({*result.unexpected_keys, *(before.keys() ^ after.keys())})
        if wrong or not all(torch.equal(after[name].cpu(), tensor) for name, tensor in before.items()):
            message = f"PEFT does not read back what it saves for this model: {', '.join(wrong[:3]) or 'other values'}"
            raise StageFailed("config", message, "choose other layers: `lora: {target_modules: [...]}`")


def check_adapter(payload: Path, settings: Places, found: Targets, before: dict[str, torch.Tensor], events: Events) -> None:
    """Raises StageFailed unless the saved adapter is complete, finite, as configured, and changed since `before`, its first weights."""
    tensors = load_file(payload / "adapter_model.safetensors")
    check_form(json.loads((payload / "adapter_config.json").read_text(encoding="utf-8")), tensors, settings, found)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise StageFailed("data", f"{len(broken)} tensors of the adapter are not finite, the first {broken[0]}", "lower learning_rate")
    parts = [name for name in tensors if not any(part in name for part in UNCHECKED)]
    if same := [name for name in parts if torch.equal(tensors[name], before[name])]:
        if len(same) == len(parts):
            trained = "lora_B" if settings.kind == "lora" else "tensor"
            raise StageFailed(
                "data",
                f"the training changed nothing: every {trained} of the adapter has its initial value",
                "raise learning_rate, or train for more steps",
            )
        events.warning(f"{len(same)} of {len(parts)} adapted layers did not change in the training, the first {same[0]}")


def score_only_trained_tokens() -> None:
    """Skip the head's computation for prompts and padding on every device, as TRL does by default only on GPUs with Triton.

    TRL avoids it elsewhere because other accelerators may recompile for each new shape. Loss and gradients are the same; on a CPU
    SmolLM2-135M with short answers takes 2.6 s a step instead of 3.6 s. There the head also computes narrow tiles of logits, which stay
    in the cache while a dozen operations pass over them.
    """
    from trl.trainer import utils

    patch(utils, "_use_triton", lambda device: True)  # this module uses it for nothing else
    if not torch.cuda.is_available():
        patch(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", CPU_TILE)


class RunOnTrainBegin(TrainerCallback):
    """Checks the model as it trains: wrapped, split, and with the weights of the checkpoint."""

    def __init__(self, *checks: Callable[[], None]):
        self.checks = checks

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for check in self.checks:
            check()


# --- events and history -----------------------------------------------------------------------------------------------


class Report(TrainerCallback):
    """Emits the trainer's logs as events, and ends a training whose loss is not finite.

    Every process checks the loss (it is the same everywhere); the first one reports.
    """

    def __init__(
        self, events: Events, rows: Callable[[], list[str]], shown: Mapping[str, str] | None = None, progress_metric: str = "loss"
    ):
        """`rows` returns the ids of the step's rows in this process. `shown` maps further metrics of the log to their names as events.
        The log's `progress_metric` is shown beside the progress."""
        self.rows = rows
        self.events, self.progress_metric = events, progress_metric
        self.shown = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"} | dict(
            shown or {}
        )
        self.seconds, self.tokens = 0.0, 0.0  # of training steps in this process, without evaluations and checkpoints
        self._since = 0.0
        self._counted = 0.0  # tokens in the log so far; GRPO counts on from its checkpoint

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._counted = float(state.num_input_tokens_seen)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                of_rows = "" if name == "eval_loss" else f", with {self.rows_of_step(args)}"
                raise StageFailed(
                    "data",
                    f"{name} is {logs[name]} at step {state.global_step} of {state.max_steps}{of_rows}",
                    f"lower learning_rate (it is {args.learning_rate}), or warm up for longer"
                    if state.global_step > 1
                    else "this was the first step: check the base model's weights, the dtype and the rows",
                )
        seconds, counted = time.perf_counter() - self._since, logs.get("num_tokens", self._counted)  # GRPO counts only when it samples
        if "loss" in logs:
            tokens, self._counted = counted - self._counted, counted
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        if not state.is_world_process_zero:
            return
        for logged, name in self.shown.items():
            if logs.get(logged) is not None:
                self.events.metric(name, logs[logged], state.global_step)
        if "loss" in logs:
            if "num_tokens" in logs:
                self.events.metric("tokens_per_second", tokens / seconds, state.global_step)
            figure = next(
                entry[self.progress_metric] for entry in reversed(state.log_history) if self.progress_metric in entry
            )  # GRPO may log it less often than every step
            self.events.progress(state.global_step, state.max_steps, f"{self.progress_metric} {figure:.4f}")

    def rows_of_step(self, args: TrainingArguments) -> str:
        found: list[list[str]] = [[]] * args.world_size
        if args.world_size > 1:
            torch.distributed.all_gather_object(found, self.rows())
        else:
            found = [self.rows()]
        ids = list(dict.fromkeys(row for of_process in found for row in of_process))  # some processes may share rows
        return f"rows {', '.join(ids[:SHOWN_ROWS])}{f' and {len(ids) - SHOWN_ROWS} more' if len(ids) > SHOWN_ROWS else ''}"


def mean_of_last(history: list[dict[str, float]], name: str) -> float:
    """Return the mean of the last steps."""
    values = [entry[name] for entry in history if name in entry][-RECENT:]
    return sum(values) / len(values)


def save_history(history: list[dict[str, float]], meta: Path) -> None:
    """Write meta/history.jsonl, an object per log entry. Reports draw its curves."""
    lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in history]
    (meta / HISTORY).write_text("".join(lines), encoding="utf-8")
