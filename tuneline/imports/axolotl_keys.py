"""axolotl's keys: what becomes of each, and the defaults that differ from ours."""

from __future__ import annotations

from tuneline.config.training_aliases import TEMPLATE
from tuneline.imports.fates import REMOVE, Joined, Refused, Table, Without, each, to
from tuneline.imports.huggingface import KEPT, LOGS, LORA, MULTIMODAL, NO_FIELD, OTHER_OPTIMIZER, SPEED, TRAINING, UPLOADS
from tuneline.imports.rl import SEPARATE
from tuneline.imports.values import if_on, kernels, modules, names, number, true, whole

KINDS = {"": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto", "grpo": "grpo"}
FORMATS = {
    "alpaca": "alpaca", "completion": "text", "chat_template": "auto", "sharegpt": "sharegpt", "chatml.intel": "auto",
    "chat_template.default": "auto", "chatml.default": "auto", "chatml.ultra": "auto", "pretrain": "text",
}  # fmt: skip

KERNELS = to("train.resources.kernels", by=kernels)
SPEEDS = Without("transformers and TRL choose the kernels of layers and losses")
BY_EPOCH = Refused("write `eval_steps:` with a number of steps; an epoch has (rows of the train split) / global_batch_size steps")
TOKENS = Refused("write the model's special tokens into its tokenizer, and name the folder under `path:`")
WRAPPED = Without("FSDP wraps the layers that the model names and shards all states")
CHUNKED = Refused("experts train as they are: `lora: {target_modules: ...}` may name their tensors")
TABLE: Table = {
    **TRAINING,
    **LORA,
    **each("base_model adapter load_in_4bit load_in_8bit rl", Joined("train.method")),
    **each("datasets pretraining_dataset", Joined("data.sources")),
    "val_set_size": Joined("data.split.validation"),
    **each("micro_batch_size gradient_accumulation_steps batch_size", Joined("train.global_batch_size")),
    **each("peft_use_rslora", to("train.lora.use_rslora", by=true)),
    **each("peft_use_dora", to("train.lora.use_dora", by=true)),
    "peft_init_lora_weights": to("train.lora.init_lora_weights", by=lambda value: Without("it is the default") if value is True else value),
    "peft_layers_to_transform": to("train.lora.layers_to_transform", by=lambda value: value),
    "lora_target_linear": to("train.lora.target_modules", by=lambda value: "all-linear" if true(value) else Without("it is off")),
    "lora_target_modules": to("train.lora.target_modules", by=modules),
    "lora_target_parameters": to("train.lora.target_modules", by=modules),
    "lora_modules_to_save": to("train.lora.modules_to_save", by=names),
    "loraplus_lr_ratio": to("train.lora.lora_plus_ratio", by=number),
    "lora_rank_pattern": to("train.lora.rank_pattern", by=lambda value: value),
    "lora_alpha_pattern": to("train.lora.alpha_pattern", by=lambda value: value),
    "lora_model_dir": Joined("train.adapter"),
    "revision_of_model": to("base.revision", by=str),
    "trust_remote_code": to("base.trust_remote_code", by=true),
    "sequence_len": to("train.max_length", "data.max_length", by=whole),
    "num_epochs": to("train.num_train_epochs", by=number),
    "lr_scheduler": to("train.lr_scheduler_type", by=str),
    "cosine_min_lr_ratio": Joined("train.min_lr_ratio"),
    "optimizer": TRAINING["optim"],
    "adam_eps": to("train.adam_epsilon", by=number),
    "noisy_embedding_alpha": to("train.neftune_noise_alpha", by=number),
    "train_on_inputs": to("train.train_on", by=lambda value: "all" if true(value) else "assistant"),
    "sample_packing": to("train.packing", by=true),
    **each("flash_attention", to("train.resources.attn_implementation", by=if_on("flash_attention_2"))),
    **each("sdp_attention", to("train.resources.attn_implementation", by=if_on("sdpa"))),
    "activation_offloading": to("train.resources.activation_offloading", by=lambda value: true(value) if value != "legacy" else True),
    "context_parallel_size": to("train.resources.sequence_parallel_size", by=whole),
    "early_stopping_patience": to("train.early_stopping.patience", by=whole),
    "dataset_exact_deduplication": to("data.dedup", by=lambda value: "content" if true(value) else "none"),
    "excess_length_strategy": to("data.over_long", by=lambda value: {"drop": "drop", "raise": "error"}.get(
        value, Refused("only plain text is truncated: longer rows are dropped and counted"))),
    "min_sample_len": NO_FIELD,
    **each("rl_beta dpo_beta", to("train.beta", by=number)),
    "dpo_label_smoothing": to("train.label_smoothing", by=number),
    "kto_desirable_weight": to("train.desirable_weight", by=number),
    "kto_undesirable_weight": to("train.undesirable_weight", by=number),
    **{f"trl.{name}": fate for name, fate in {
        "beta": to("train.beta", by=number),
        "num_generations": to("train.num_generations", by=whole),
        "max_completion_length": to("train.max_completion_length", by=whole),
        "temperature": to("train.temperature", by=number),
        "top_p": to("train.top_p", by=number),
        "epsilon": to("train.epsilon", by=number),
        "epsilon_high": to("train.epsilon_high", by=number),
        "loss_type": to("train.loss_type", by=str),
        "num_iterations": to("train.num_iterations", by=whole),
        "scale_rewards": to("train.scale_rewards", by=lambda value: value if isinstance(value, str) else "group" if value else "none"),
        "importance_sampling_level": to("train.importance_sampling_level", by=str),
        "mask_truncated_completions": to("train.mask_truncated_completions", by=true),
        "chat_template_kwargs.enable_thinking": to("base.chat_template_kwargs.enable_thinking", by=true),
        "chat_template_kwargs.*": Refused("write `chat_template_kwargs: {...}` in the stage of kind `model`"),
        **each("use_vllm vllm_mode", Joined("train.rollouts")),
        **each("reward_funcs reward_weights", Joined("train.rewards")),
        **each("vllm_server_host vllm_server_port vllm_server_timeout async_prefetch", SEPARATE),
        **each("log_completions num_completions_to_print", LOGS),
        "generation_kwargs.*": Refused("sampling takes `temperature` and `top_p`, and ends at the model's own end tokens"),
        "multi_objective_aggregation": Refused("rewards are summed by their `weight`"),
    }.items()},
    "vllm.*": Without("`resources: {engine: ...}` has vLLM's settings"),
    **each("evals_per_epoch eval_table_size eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval", BY_EPOCH),
    **each("saves_per_epoch save_strategy save_total_limit auto_resume_from_checkpoints", TRAINING["save_strategy"]),
    **each("wandb_name wandb_watch wandb_log_model wandb_run_id trackio_run_name trackio_space_id swanlab_experiment_name swanlab_mode"
           " swanlab_description swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer"
           " swanlab_log_model swanlab_workspace use_otel_metrics otel_metrics_host otel_metrics_port debug", LOGS),
    "wandb_project": to("pipeline.track.wandb.project", by=str),
    "wandb_entity": to("pipeline.track.wandb.entity", by=str),
    "trackio_project_name": to("pipeline.track.trackio.project", by=str),
    "mlflow_tracking_uri": to("pipeline.track.mlflow.tracking_uri", by=str),
    "use_tensorboard": to("pipeline.track.tensorboard", by=lambda value: {} if true(value) else Without("it is off")),
    "use_wandb": Joined("pipeline.track"),
    **each("swanlab_project use_swanlab", Refused("`track:` has tensorboard, wandb, mlflow and trackio")),
    **each("dataset_prepared_path push_dataset_to_hub skip_prepare_dataset shuffle_merged_datasets eval_batch_size dataset_processes",
           Without("the dataset is an artifact in the store, its rows shuffled by the seed")),
    **each("pad_to_sequence_len eval_sample_packing max_packed_sequence_len sample_packing_eff_est total_num_tokens"
           " sample_packing_seq_len_multiplier sample_packing_sequentially pretrain_multipack_attn streaming_multipack_buffer_size"
           " streaming", Without("it only changes how rows are laid out in memory")),
    **each("tokenizer_type tokenizer_use_fast tokenizer_legacy model_type tokenizer_config cls_model_config tokenizer_use_mistral_common"
           " strict low_cpu_mem_usage torchdistx_path local_rank device_map device_map.* experimental_skip_move_to_device"
           " lora_fan_in_fan_out base_model_ignore_patterns test_value use_ray ray_num_workers full_finetune ddp lora_on_cpu",
           Without("the model's own tokenizer and classes are used, on the devices of `resources:`")),
    **each("liger_rope liger_rms_norm liger_glu_activation liger_layer_norm"
           " liger_fused_linear_cross_entropy liger_rms_norm_gated", KERNELS),
    **each("plugins lora_mlp_kernel lora_qkv_kernel lora_o_kernel cut_cross_entropy flash_attn_cross_entropy flash_attn_rms_norm"
           " flash_attn_fuse_mlp flash_optimum use_kernels fused_attn_kernel flex_attn_compile_kwargs.* torch_compile_mode tiled_mlp"
           " accelerator_config.* gemma4_hybrid_attn_impl experts_implementation lora_embedding_kernel", SPEEDS),
    **each("chat_template chat_template_jinja", Without(TEMPLATE.removeprefix(REMOVE))),
    **each("special_tokens.pad_token resize_token_embeddings_to_32x", Without("padding is never trained on")),
    "tokens": to("train.add_tokens", by=names),
    **each("special_tokens.* special_tokens tokens.* eot_tokens", TOKENS),
    **each("loss_watchdog_threshold loss_watchdog_patience", Without("a training whose loss is no finite number fails")),
    **each("fsdp fsdp_config", Joined("train.resources.strategy")),
    **each("fsdp_config.offload_params fsdp_config.fsdp_offload_params", Joined("train.resources.offload")),
    **each("fsdp_config.activation_checkpointing fsdp_config.fsdp_activation_checkpointing", to(
        "train.resources.gradient_checkpointing", by=true)),
    **each("fsdp_config.* fsdp_version", WRAPPED),
    "gradient_checkpointing": to("train.resources.gradient_checkpointing", by=lambda value: (
        value in ("offload", "offload_disk") or true(value))),
    "gradient_checkpointing_kwargs.*": TRAINING["gradient_checkpointing_kwargs"],
    "peft.loftq_config.*": Refused("LoftQ is `lora: {init_lora_weights: loftq}` with `method: qlora`, in 4 bits"),
    **each("gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config model_quantization_config_kwargs.*", Refused(
        "a training takes a model in full precision: `method: qlora` quantizes it")),
    **each("bnb_config_kwargs.* bnb_config_kwargs", Without("4 bits are NF4 with double quantization")),
    **each("qat.* fp8 fp8_enable_fsdp_float8_all_gather nvfp4_merge_aware llmcompressor.* use_onebitllms peft.*", Refused(
        "after the training, a stage of kind `quantize` quantizes by GPTQ")),
    **each("unfrozen_parameters reinit_weights relora relora_prune_ratio relora_cpu_offload jagged_restart_steps"
           " jagged_restart_anneal_steps jagged_restart_warmup_steps lisa_n_layers lisa_step_interval lisa_layers_attribute", Refused(
        "what trains is an adapter or all weights: `lora: {layers_to_transform: [...]}` chooses layers")),
    **each("quantize_moe_experts use_scattermoe use_sonicmoe llama4_linearized_experts model_config.output_router_logits"
           " expert_parallel_size expert_parallel_token_capacity expert_parallel_num_nvl_bytes dsv4_fp4_grouped_mode use_dsv4_kernels"
           " use_glm_dsa_kernels", CHUNKED),
    **each("dp_shard_size dp_replicate_size tensor_parallel_size", Refused("write `resources: {strategy: fsdp}`, or zero3")),
    **each("ebft.* ebft diffusion.* reward_model process_reward_model center_rewards_coefficient num_labels orpo_alpha use_eaft eaft_alpha"
           " eaft_k simpo_gamma curriculum_sampling", Refused("what trains is `sft`, `dpo`, `kto` and `grpo`")),
    **each("cosine_constant_lr_ratio eta_min lr_quadratic_warmup", Refused("write `lr_scheduler_kwargs:` of one of our schedules")),
    **each("processor_type freeze_mm_modules image_size image_resize_algorithm", MULTIMODAL),
    "test_datasets": Joined("evaluate.datasets"),
    "hf_use_auth_token": Without("HF_TOKEN comes from the environment"),
    "hub_model_id": UPLOADS,
    **each("output_dir", KEPT),
    **each("galore_rank optim_target_modules optim_args", OTHER_OPTIMIZER),
    "world_size": Without(SPEED),
}  # fmt: skip
DATASET: Table = {
    **{f"datasets[].{name}": fate for name, fate in {
        **each("path type split name data_files ds_type field_messages field_instruction field_output field_input field_system field"
               " field_chosen field_rejected message_property_mappings.role message_property_mappings.content message_field_role"
               " message_field_content revision text_column chat_template", Joined("data.sources")),
        "trust_remote_code": Without("files are read, code of a dataset is not run"),
        **each("roles.user roles.assistant roles.system roles.tool", Without(
            "roles human, gpt, user, assistant, system and tool are known")),
        **each("roles_to_train train_on_eos train_on_eot", Without("`train_on: assistant` trains on every answer and its end")),
        **each("field_thinking template_thinking_key field_tools", Without("reasoning and tools have columns and keys that are known")),
        "drop_system_message": NO_FIELD,
        "train_on_last_step_only": Refused("write `train_on: completion`"),
        **each("step_separator max_completion_length", NO_FIELD),
        "shards": Refused("write `max_rows:` of the source"),
    }.items()},
}  # fmt: skip
TABLE = {**TABLE, **DATASET, **{key.replace("datasets[]", "pretraining_dataset[]"): fate for key, fate in DATASET.items()}}
DEFAULTS = {
    "num_epochs": 1.0, "lr_scheduler": "cosine", "sequence_len": 512, "lora_dropout": 0.0, "weight_decay": 0.0, "warmup_ratio": 0.03,
    "max_grad_norm": 1.0,
}  # fmt: skip
