"""Fates of the names of transformers' TrainingArguments and PEFT's LoraConfig, which most tools share."""

from __future__ import annotations

from tuneline.config.training_aliases import ATTEMPTS, EVERY_STEP, STORED
from tuneline.imports.fates import REMOVE, Fate, Joined, Refused, Without, each, to
from tuneline.imports.values import (
    above,
    attention,
    brain_float,
    dtype,
    half,
    kernels,
    modules,
    number,
    optimizer,
    trackers,
    true,
    warmup,
    whole,
)

SPEED = "it only changes speed"
FITS = "rows of similar length always share a micro-batch"
SAVES = Without("checkpoints serve resuming; the finished adapter or model is an artifact in the store")
LOGS = Without(EVERY_STEP.removeprefix(REMOVE))
KEPT = Without(STORED.removeprefix(REMOVE))
RESUMES = Without(ATTEMPTS.removeprefix(REMOVE))
UPLOADS = Without("a training uploads nothing: `tuneline export PIPELINE/STAGE DIR --push OWNER/NAME` does")
MULTIMODAL = Refused("tuneline trains text models only")
NO_VISION = Without("text models have no such part")
MEGATRON = Refused("tuneline has no Megatron: write `resources: {strategy: zero3}` for models that exceed a GPU")
OTHER_CHIPS = Refused("tuneline trains on CPUs and on GPUs that torch calls cuda")
OTHER_OPTIMIZER = Refused("this optimizer is not offered: `optim:` of the training has the others")
DAY = 86_400  # seconds
ENDLESS = Without("so long a time stands for no limit; here a collective that hangs ends the attempt")
NO_FIELD = Refused("tuneline has no such setting")

TRAINING: dict[str, Fate] = {
    "learning_rate": to("train.learning_rate", by=number),
    "weight_decay": to("train.weight_decay", by=number),
    "max_grad_norm": to("train.max_grad_norm", by=number),
    "seed": to("train.seed", "data.seed", by=whole),
    "num_train_epochs": to("train.num_train_epochs", by=number),
    "max_steps": to("train.max_steps", by=above(0)),
    "lr_scheduler_type": to("train.lr_scheduler_type", by=str),
    "lr_scheduler_kwargs": Joined("train.min_lr_ratio"),
    **each("warmup_ratio warmup_steps", to("train.warmup_steps", by=warmup)),
    "optim": to("train.optim", by=optimizer),
    "adam_beta1": to("train.adam_beta1", by=number),
    "adam_beta2": to("train.adam_beta2", by=number),
    "adam_epsilon": to("train.adam_epsilon", by=number),
    "neftune_noise_alpha": to("train.neftune_noise_alpha", by=number),
    "label_smoothing_factor": to("train.label_smoothing", by=number),
    **each("per_device_train_batch_size gradient_accumulation_steps", Joined("train.global_batch_size")),
    **each("bf16 pure_bf16 bfloat16", to("train.dtype", by=brain_float)),
    **each("fp16 float16", to("train.dtype", by=half)),
    "torch_dtype": to("train.dtype", by=dtype),
    "gradient_checkpointing": to("train.resources.gradient_checkpointing", by=true),
    "use_liger_kernel": to("train.resources.kernels", by=kernels),
    "torch_compile": to("train.resources.compile", by=true),
    "attn_implementation": to("train.resources.attn_implementation", by=attention),
    "eval_steps": Joined("train.eval_steps"),
    **each("eval_strategy evaluation_strategy", Joined("train.eval_steps")),
    "do_eval": Without("`eval_steps` decides it"),
    "save_steps": to("train.resources.checkpoint_steps", by=lambda value: whole(value) if number(value) >= 1 else SAVES),
    "save_total_limit": to("train.resources.checkpoints_kept", by=lambda value: max(2, whole(value))),
    "report_to": to("pipeline.track", by=trackers),
    "ddp_timeout": to("train.resources.collective_timeout", by=lambda value: whole(value) if number(value) < DAY else ENDLESS),
    "deepspeed": Joined("train.resources.strategy"),
    "fsdp": Joined("train.resources.strategy"),
    "load_best_model_at_end": to("train.save_best", by=true),
    "metric_for_best_model": Without("the best checkpoint is the one with the lowest validation loss"),
    "greater_is_better": Without("the best checkpoint is the one with the lowest validation loss"),
    **each("save_strategy save_only_model save_safetensors safe_serialization save_on_each_node", SAVES),
    **each("output_dir logging_dir cache_dir", KEPT),
    **each("logging_steps logging_strategy logging_first_step plot_loss disable_tqdm log_level", LOGS),
    **each("overwrite_output_dir resume_from_checkpoint resume_only_model ignore_data_skip", RESUMES),
    "run_name": Without("runs have their own names and ids"),
    **each("push_to_hub hub_model_id hub_token hub_private_repo hub_strategy commit_message", UPLOADS),
    **each("dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor", Without(SPEED)),
    **each("ddp_find_unused_parameters ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers tf32", Without(SPEED)),
    **each("remove_unused_columns label_names include_num_input_tokens_seen include_effective_tokens_per_second", Without(
        "columns are chosen by the rows' format"
    )),
    "per_device_eval_batch_size": Without("validation uses `resources: {micro_batch_size: ...}`"),
    **each("gradient_checkpointing_kwargs use_reentrant_gc", Without("re-entrant checkpointing is never used; the gradients are the same")),
    **each("group_by_length length_column_name", Without(FITS)),
    "dataloader_drop_last": Without("an epoch's last step takes the rows that are left"),
    "data_seed": to("data.seed", by=whole),
    "do_train": Without("a training stage trains"),
    **each("use_cpu no_cuda", Refused("remove `gpus` from `resources:` to train on the CPU")),
}  # fmt: skip

LORA: dict[str, Fate] = {
    **each("lora_rank lora_r", to("train.lora.r", by=whole)),
    "lora_alpha": to("train.lora.lora_alpha", by=number),
    "lora_dropout": to("train.lora.lora_dropout", by=number),
    **each("target_modules lora_target lora_target_modules", to("train.lora.target_modules", by=modules)),
    "use_rslora": to("train.lora.use_rslora", by=true),
    "use_dora": to("train.lora.use_dora", by=true),
}
