"""Fields of trainings in LLaMA-Factory, axolotl, ms-swift, TRL and others, and what to write instead. Only data: see `aliases.py`."""

from __future__ import annotations

STORED = "remove it: artifacts, checkpoints and logs are in the store; `tuneline show` prints their folders"
EVERY_STEP = "remove it: every step is logged"
REPORTS = "write `track: {tensorboard: {}}` or `track: {wandb: {}}` under the pipeline: docs/trackers.md"
NONE = "remove it: tuneline has no such setting"
TEMPLATE = "remove it: the model's own chat template is used"
ANOTHER_TEMPLATE = f"{TEMPLATE}; another one is a file, `chat_template:` in the stage of kind `model`"
THINKING = "write `chat_template_kwargs: {enable_thinking: false}` in the stage of kind `model`"
MOST_ROWS = "write `max_rows` in a source of the stage of kind `dataset`"
ROWS = "rows come from a stage of kind `dataset`: name it in `dataset:`"
BASE = "write `model:` with the name of a stage of kind `model`, which has `hub:` or `path:`"
HELD_OUT = "write `split: {validation: 0.1}` in the stage of kind `dataset`"
QLORA = "write `method: qlora` and `bits: {}`"
ZERO = "write `resources: {strategy: zero3}` (or zero1, zero2); tuneline writes DeepSpeed's configuration"
FSDP = "write `resources: {strategy: fsdp}`"
FASTER = "remove it: `resources:` has `attn_implementation`, `kernels` and `compile`"
ATTENTION = "write `resources: {attn_implementation: flash_attention_2}`, or leave it out: `auto` prefers flash attention on GPUs"
REWARDED = "write `rewards: [{type: exact_match}]`, or `{file: rewards.py, function: NAME}` for your own"
ATTEMPTS = "remove it: an interrupted training resumes from its newest checkpoint when it is run again"

TRAINING_ALIASES: dict[str, dict[str, str]] = {
    "Training": {
        **dict.fromkeys(("lr", "peak_lr"), "write `learning_rate`"),
        **dict.fromkeys(("scheduler", "lr_scheduler"), "write `lr_scheduler_type`"),
        **dict.fromkeys(("warmup_ratio", "warmup"), "write `warmup_steps: 0.1`: a value below 1 is a share of all steps"),
        **dict.fromkeys(("epochs", "num_epochs"), "write `num_train_epochs`"),
        **dict.fromkeys(("max_grad_clip", "gradient_clipping", "grad_clip"), "write `max_grad_norm`"),
        **dict.fromkeys(("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "model_max_length"), "write `max_length`"),
        **dict.fromkeys(("lora_r", "lora_rank", "rank"), "write `lora: {r: ...}`"),
        **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), "write `lora: {target_modules: ...}`"),
        "alpha": "write `lora: {lora_alpha: ...}`",
        "peft_use_dora": "write `lora: {use_dora: true}`",
        "peft_use_rslora": "write `lora: {use_rslora: true}`",
        **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "use_peft"), "write `method: lora`, qlora or full"),
        **dict.fromkeys(("load_in_4bit", "quantization_bit", "quant_bits", "bnb_4bit_quant_type"), QLORA.format(4)),
        "load_in_8bit": QLORA.format(8),
        **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation"), (
            "set `global_batch_size` (rows per step): accumulation follows from it and `resources.micro_batch_size`"
        )),
        **dict.fromkeys(("batch_size", "per_device_train_batch_size", "train_batch_size"), (
            "write `global_batch_size` (rows per step over all devices) or `resources.micro_batch_size` (rows per device)"
        )),
        **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), (
            "remove it: validation uses `resources: {micro_batch_size: ...}`"
        )),
        **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio", "eval_dataset", "val_dataset", "test_datasets"), HELD_OUT),
        **dict.fromkeys(("eval_strategy", "evaluation_strategy", "evals_per_epoch", "do_eval"), (
            "write `eval_steps: 50` to evaluate on the validation split every 50 steps"
        )),
        "early_stopping_patience": "write `early_stopping: {patience: 3}`, with `eval_steps`",
        **dict.fromkeys(("save_steps", "save_strategy", "saves_per_epoch"), (
            "write `resources: {checkpoint_steps: 50}`: a checkpoint every 50 steps"
        )),
        "save_total_limit": "write `resources: {checkpoints_kept: 2}`",
        **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints", "overwrite_output_dir", "overwrite_cache"), ATTEMPTS),
        **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step", "plot_loss", "disable_tqdm"), EVERY_STEP),
        **dict.fromkeys(("logging_dir", "save_only_model", "save_safetensors", "dataset_prepared_path"), STORED),
        **dict.fromkeys(("report_to", "run_name", "wandb_project", "wandb_entity", "wandb_run_id", "mlflow_tracking_uri"), REPORTS),
        **dict.fromkeys(("push_to_hub", "hub_model_id"), "remove it: tuneline uploads nothing"),
        **dict.fromkeys(("template", "chat_template", "chat_template_jinja", "conversation_template"), ANOTHER_TEMPLATE),
        **dict.fromkeys(("enable_thinking", "chat_template_kwargs", "chat_template_args", "reasoning_effort"), THINKING),
        **dict.fromkeys(("default_system", "system", "system_prompt"), "write `system` in the stage of kind `dataset`, or in a source"),
        **dict.fromkeys(("interleave_probs", "mix_strategy", "dataset_mixer"), "write `weight` in each of `sources:` of the dataset"),
        **dict.fromkeys(("model_name_or_path", "model_name", "base_model", "model_path", "model_id", "pretrained"), BASE),
        **dict.fromkeys(("adapter_name_or_path", "lora_model_dir", "adapters"), (
            "write `adapter:` with the name of a training stage, to train its adapter further"
        )),
        **dict.fromkeys(("tokenizer", "tokenizer_type", "tokenizer_name"), "remove it: the model's own tokenizer is used"),
        **dict.fromkeys(("datasets", "data", "dataset_dir", "dataset_name", "data_path", "train_file", "train_dataset"), ROWS),
        **dict.fromkeys(("dataset_text_field", "preprocessing_num_workers", "dataset_num_proc", "streaming"), ROWS),
        **dict.fromkeys(("max_samples", "max_train_samples"), MOST_ROWS),
        **dict.fromkeys(("bf16", "bfloat16", "pure_bf16"), "write `dtype: bfloat16`, the default on GPUs"),
        **dict.fromkeys(("fp16", "float16", "tf32", "torch_dtype"), (
            "write `dtype: bfloat16`, the default on GPUs, or float32: float16 is not offered"
        )),
        **dict.fromkeys(("flash_attn", "flash_attention", "attn_impl", "sdp_attention", "eager_attention"), ATTENTION),
        **dict.fromkeys(("use_liger_kernel", "enable_liger_kernel", "use_liger"), "write `resources: {kernels: liger}`"),
        "torch_compile": "write `resources: {compile: true}`",
        **dict.fromkeys(("xformers_attention", "use_unsloth"), FASTER),
        **dict.fromkeys(("sample_packing", "neat_packing", "pad_to_sequence_len", "multipack"), "write `packing: true`"),
        **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "write `train_on: all`, or assistant, the default"),
        **dict.fromkeys(("assistant_only_loss", "roles_to_train"), (
            "write `train_on: assistant`, the default, completion, or `{last: 2}`"
        )),
        "loss_scale": "write `train_on: completion` for the last answer (last_round), or assistant, the default",
        **dict.fromkeys(("completion_only_loss", "mask_history"), "write `train_on: completion`: the last answer only"),
        **dict.fromkeys(("deepspeed", "ds_config", "zero_stage"), ZERO),
        **dict.fromkeys(("fsdp", "fsdp_config"), FSDP),
        **dict.fromkeys(("sequence_parallel_degree", "context_parallel_size"), "write `resources: {sequence_parallel_size: ...}`"),
        **dict.fromkeys(("use_gradient_checkpointing", "gradient_checkpointing_kwargs"), (
            "write `resources: {gradient_checkpointing: true}`"
        )),
        "ddp_timeout": "write `resources: {collective_timeout: 1800}`, in seconds",
        "trust_remote_code": "write it in the stage of kind `model`",
        **dict.fromkeys(("do_train", "do_predict"), "remove it: a training stage trains"),
        "rl": "remove it: the stage's kind says how it trains, such as `kind: dpo` or `kind: grpo`",
        **dict.fromkeys(("optimizer", "optim_type"), "write `optim: adamw`, or adamw_8bit, adafactor, lion, muon"),
        "use_muon": "write `optim: muon`",
        **dict.fromkeys(("lr_scheduler_kwargs", "min_lr", "min_lr_rate", "cosine_min_lr_ratio"), (
            "write `min_lr_ratio: 0.1`, a share of learning_rate; `lr_decay_steps` and `lr_power` are fields as well"
        )),
        "num_decay_steps": "write `lr_decay_steps`",
        **dict.fromkeys(("neftune_alpha", "noisy_embedding_alpha"), "write `neftune_noise_alpha: 5`"),
        "label_smoothing_factor": "write `label_smoothing: 0.1`",
        **dict.fromkeys(("use_galore", "optim_args", "optim_target_modules"), NONE),
        **dict.fromkeys(("loraplus_lr_ratio", "lorap_lr_ratio", "lora_plus_lr_ratio"), "write `lora: {lora_plus_ratio: 16}`"),
        **dict.fromkeys(("pissa_init", "pissa_iter", "pissa_convert"), (
            "write `lora: {init_lora_weights: pissa}`, or pissa_niter_16, which is faster: the adapter fits the unchanged base"
        )),
        **dict.fromkeys(("init_weights", "init_lora_weights", "peft_init_lora_weights"), "write `lora: {init_lora_weights: ...}`"),
        **dict.fromkeys(("lora_exclude_modules", "exclude_modules", "target_regex"), (
            "write `lora: {exclude_modules: [...]}`, or an expression as target_modules"
        )),
        **dict.fromkeys(("peft_layers_to_transform", "layers_to_transform"), "write `lora: {layers_to_transform: [0, 1]}`"),
        **dict.fromkeys(("new_special_tokens", "add_special_tokens", "new_special_tokens_config"), "write `add_tokens: [...]`"),
        **dict.fromkeys(("vera_rank", "vera_d_initial", "vera_dropout", "vera_projection_prng_key"), "write `vera: {r: 256}`"),
        **dict.fromkeys(("oft_block_size", "oft_rank", "oft_target", "oft_eps", "oft_coft"), "write `oft: {oft_block_size: 32}`"),
        "loftq_config": "write `lora: {init_lora_weights: loftq}`, with `method: qlora`: one step, in 4 bits",
        "resize_vocab": "write `add_tokens: [...]`",
        **dict.fromkeys(("adalora_target_r", "adalora_init_r"), "write `adalora: {target_r: 8, init_r: 12}`, and max_steps"),
        "adalora": "remove it: only `sft` trains AdaLoRA; `lora: {rank_pattern: {...}}` gives layers different ranks",
        **dict.fromkeys(("special_tokens", "freeze_trainable_layers"), NONE),
        **dict.fromkeys(("lora_modules_to_save", "modules_to_save", "additional_target"), "write `lora: {modules_to_save: [...]}`"),
        "rope_scaling": "remove it: set it in the model's config.json",
        **dict.fromkeys(("group_by_length", "length_column_name", "padding_free"), "remove it: micro-batches are not padded anyway"),
        **dict.fromkeys(("model_revision", "revision_of_model"), "write `revision:` in the stage of kind `model`"),
        "rlhf_type": "write it as the kind of the stage, such as `kind: dpo` or `kind: grpo`",
        **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), (
            "write `save_best: true` with `eval_steps`; `early_stopping: {patience: 3}` keeps the best as well, and stops"
        )),
        "lm_eval_tasks": "add a stage of kind `evaluate` with `benchmarks: [arc_easy]`",
        **dict.fromkeys(("hf_use_auth_token", "hub_token", "token"), "set HF_TOKEN in the environment"),
        "dataloader_num_workers": NONE,
    },
    "PreferenceTraining": {
        **dict.fromkeys(("packing", "sample_packing", "neat_packing", "multipack"), "remove it: only `sft` packs rows"),
        **dict.fromkeys(("train_on", "train_on_inputs", "train_on_prompt", "completion_only_loss", "mask_history", "assistant_only_loss"), (
            "remove it: the last answer of each row counts"
        )),
        **dict.fromkeys(("pref_beta", "dpo_beta"), "write `beta`"),
        **dict.fromkeys(("pref_ftx", "dpo_ftx", "sft_alpha", "rl_alpha"), "write `rpo_alpha`"),
        **dict.fromkeys(("pref_loss", "dpo_loss", "kto_loss"), "write `loss_type`"),
        **dict.fromkeys(("dpo_label_smoothing", "label_smoothing_factor"), "write `label_smoothing`, with `loss_type: robust`"),
        **dict.fromkeys(("ref_model", "ref_model_adapters", "reference_model", "ref_adapters"), (
            "remove it: the reference is the model before the training, with `adapter:` if one is continued"
        )),
        **dict.fromkeys(("max_prompt_length", "max_completion_length", "truncation_mode"), (
            "remove it: rows longer than `max_length` are refused; the dataset stage drops them"
        )),
        **dict.fromkeys(("precompute_ref_log_probs", "sync_ref_model", "disable_dropout"), NONE),
    },
    "GrpoStage": {
        **dict.fromkeys(("reward_funcs", "reward_functions", "reward", "reward_model"), REWARDED),
        "reward_weights": "write `weight:` in each of `rewards:`",
        **dict.fromkeys(("max_length", "max_new_tokens", "cutoff_len", "sequence_len", "max_seq_length"), "write `max_completion_length`"),
        "max_prompt_length": "set `max_length` in the dataset stage",
        **dict.fromkeys(("method", "bits", "load_in_4bit", "load_in_8bit", "finetuning_type"), "remove it: grpo trains a LoRA adapter"),
        **dict.fromkeys(("use_vllm", "vllm_mode"), "write `rollouts: {engine: vllm}`"),
        "kl_coef": "write `beta`",
    },
    "Resources": {
        **dict.fromkeys(("deepspeed", "zero", "zero_stage"), "write `strategy: zero3` (or zero1, zero2)"),
        "fsdp": "write `strategy: fsdp`",
        **dict.fromkeys(("gpu", "num_gpus", "n_gpus", "gpu_count"), "write `gpus`"),
        **dict.fromkeys(("num_nodes", "nnodes", "machines"), "write `nodes`"),
        **dict.fromkeys(("nproc_per_node", "num_processes", "workers"), (
            "write `processes`, on a machine without GPUs; with GPUs it is `gpus`"
        )),
        **dict.fromkeys(("batch_size", "per_device_train_batch_size", "per_device_batch_size"), "write `micro_batch_size`"),
        **dict.fromkeys(("gradient_accumulation_steps", "global_batch_size"), (
            "set `global_batch_size` in the stage: it does not only change speed"
        )),
        **dict.fromkeys(("cpu_offload", "offload_optimizer"), "write `offload: optimizer`"),
        "save_steps": "write `checkpoint_steps`",
        **dict.fromkeys(("flash_attn", "flash_attention", "attn_impl", "attention"), "write `attn_implementation: flash_attention_2`"),
        **dict.fromkeys(("use_liger_kernel", "enable_liger_kernel", "liger"), "write `kernels: liger`"),
        "torch_compile": "write `compile: true`",
        "save_total_limit": "write `checkpoints_kept`",
        **dict.fromkeys(("cuda_visible_devices", "gpu_ids"), "write `devices: [0]`"),
        **dict.fromkeys(("memory", "cpus", "cpu"), "remove it: tuneline reserves GPUs only"),
    },
    "Lora": {
        **dict.fromkeys(("rank", "lora_r", "lora_rank"), "write `r`"),
        "alpha": "write `lora_alpha`",
        "dropout": "write `lora_dropout`",
        **dict.fromkeys(("lora_target", "target", "targets", "lora_target_modules"), "write `target_modules`"),
        "dora": "write `use_dora`",
        "rslora": "write `use_rslora`",
        **dict.fromkeys(("init_weights", "pissa_init"), "write `init_lora_weights: pissa`"),
        **dict.fromkeys(("loraplus_lr_ratio", "lorap_lr_ratio"), "write `lora_plus_ratio`"),
        **dict.fromkeys(("additional_target", "lora_modules_to_save"), "write `modules_to_save`"),
        **dict.fromkeys(("target_regex", "lora_target_regex"), "write the expression as `target_modules`"),
        "trainable_token_indices": "write `add_tokens: [...]` in the stage",
        **dict.fromkeys(("target_parameters", "lora_target_parameters"), "write the names of the experts' tensors in `target_modules`"),
        "bias": NONE,
        "task_type": "remove it: every model is a causal language model",
    },
}  # fmt: skip
