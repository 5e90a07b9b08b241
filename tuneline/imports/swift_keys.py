"""ms-swift's keys: what becomes of each, and the defaults of its arguments."""

from __future__ import annotations

from tuneline.config.training_aliases import TEMPLATE
from tuneline.imports.fates import REMOVE, Joined, Refused, Table, Without, each, same_if, to
from tuneline.imports.huggingface import (
    KEPT,
    LOGS,
    LORA,
    MEGATRON,
    MULTIMODAL,
    NO_FIELD,
    NO_VISION,
    OTHER_CHIPS,
    OTHER_OPTIMIZER,
    SPEED,
    TRAINING,
    UPLOADS,
)
from tuneline.imports.rl import SEPARATE
from tuneline.imports.values import attention, dtype, names, number, size, top_k, true, whole

METHODS = {"lora": "lora", "full": "full"}

OTHER_TUNER = Refused("what trains is `method: lora`, qlora or full, with the variants under `lora:`")
THINKING = to("base.chat_template_kwargs.enable_thinking", by=true)
OTHER_RL = Refused("`grpo` has `loss_type`, `scale_rewards`, `importance_sampling_level`, `epsilon_high` and `beta`")
IDENTITY = Refused("write a file in which {{NAME}} and {{AUTHOR}} are replaced, and name it in `sources:`")
TABLE: Table = {
    **TRAINING,
    **LORA,
    **each("model tuner_type train_type sft_type rlhf_type", Joined("train.method")),
    **each("quant_method quant_bits", Joined("train.method")),
    **each("dataset external_plugins", Joined("data.sources")),
    **each("split_dataset_ratio", Joined("data.split.validation")),
    **each("adapters resume_from_checkpoint_adapter", Joined("train.adapter")),
    **each("use_vllm vllm_mode vllm_gpu_memory_utilization vllm_max_model_len", Joined("train.rollouts")),
    **each("reward_funcs reward_weights", Joined("train.rewards")),
    "loss_scale": Joined("train.train_on"),
    "model_revision": to("base.revision", by=str),
    "max_length": to("train.max_length", "data.max_length", by=whole),
    "truncation_strategy": same_if(("delete",), "longer rows are dropped and counted", Refused(
        "a conversation is never truncated: longer rows are dropped and counted")),
    "system": to("data.system", by=str),
    "packing": to("train.packing", by=true),
    "padding_free": Without("it only changes speed"),
    "attn_impl": to("train.resources.attn_implementation", by=attention),
    "sequence_parallel_size": to("train.resources.sequence_parallel_size", by=whole),
    "modules_to_save": to("train.lora.modules_to_save", by=names),
    "target_regex": to("train.lora.target_modules", by=str),
    "lora_bias": same_if(("none",), "biases are not trained", NO_FIELD),
    "lora_dtype": Without("an adapter trains in float32"),
    "lorap_lr_ratio": to("train.lora.lora_plus_ratio", by=number),
    "init_weights": to("train.lora.init_lora_weights", by=lambda value: Without("it is the default") if value in (True, "true")
                       else value if value != "lora-ga" else Refused("LoRA-GA is not offered: `pissa` and `eva` are near")),
    "early_stop_interval": to("train.early_stopping.patience", by=whole),
    "max_epochs": to("train.num_train_epochs", by=number),
    "stop_words": Without("`stop:` of a stage of kind `evaluate` ends answers; a training ends them as the template does"),
    "beta": to("train.beta", by=number),
    "rpo_alpha": to("train.rpo_alpha", by=number),
    "label_smoothing": to("train.label_smoothing", by=number),
    "loss_type": to("train.loss_type", by=lambda value: value[0] if isinstance(value, list) and len(value) == 1 else
                    value if isinstance(value, str) else Refused("one loss is computed: write `loss_type:` with one of them")),
    "desirable_weight": to("train.desirable_weight", by=number),
    "undesirable_weight": to("train.undesirable_weight", by=number),
    "num_generations": to("train.num_generations", by=whole),
    **each("max_completion_length response_length", to("train.max_completion_length", by=whole)),
    "temperature": to("train.temperature", by=number),
    "top_p": to("train.top_p", by=number),
    "top_k": to("train.top_k", by=top_k),
    "num_iterations": to("train.num_iterations", by=whole),
    "epsilon": to("train.epsilon", by=number),
    "epsilon_high": to("train.epsilon_high", by=number),
    "importance_sampling_level": to("train.importance_sampling_level", by=str),
    "scale_rewards": to("train.scale_rewards", by=lambda value: value if isinstance(value, str) else "group" if value else "none"),
    "overlong_filter": to("train.mask_truncated_completions", by=true),
    **each("steps_per_generation generation_batch_size", Without("each step trains on the completions that it samples")),
    "advantage_estimator": same_if(("grpo",), "grpo is what trains", OTHER_RL),
    "kl_in_reward": OTHER_RL,
    **each("log_completions log_entropy log_rollout_offpolicy_metrics", LOGS),
    **each("sleep_level offload_model offload_optimizer move_model_batches gc_collect_after_offload vllm_enable_prefix_caching"
           " vllm_enable_lora vllm_max_lora_rank vllm_enforce_eager vllm_max_num_seqs ds3_gather_for_generation",
           Without("the training and vLLM are processes of their own: `resources: {engine: ...}`")),
    **each("vllm_tensor_parallel_size vllm_server_host vllm_server_port vllm_server_timeout vllm_server_base_url"
           " vllm_data_parallel_size vllm_pipeline_parallel_size", SEPARATE),
    **each("async_generate dynamic_sample delta fipo_decay_rate fipo_clip_range fipo_clip_high_only fipo_safety_threshold tau_pos"
           " tau_neg chord_sft_per_device_train_batch_size chord_sft_dataset chord_enable_phi_function chord_mu_warmup_steps"
           " chord_mu_decay_steps chord_mu_peak chord_mu_valley soft_cache_length soft_max_length cosine_max_len"
           " repetition_max_penalty", OTHER_RL),
    **each("use_gym_env multi_turn_scheduler max_turns gym_env context_manager vllm_server_pass_dataset", Refused(
        "a completion is one answer: rollouts of several turns are not offered")),
    **each("reward_model reward_adapters reward_model_plugin", Refused("rewards are functions: docs/rewards.md")),
    **each("ref_model ref_adapters", Refused("the reference is the model before training")),
    **each("teacher_model teacher_deepspeed teacher_adapters lmbda sft_alpha seq_kd teacher_model_server", Refused(
        "tuneline has no distillation: `sft` trains on answers in a dataset")),
    **each("loss_weights enable_dft_loss enable_channel_loss", Refused("the loss is one, cross-entropy or that of `loss_type:`")),
    **each("model_type template agent_template template_backend use_chat_template", Without(TEMPLATE.removeprefix(REMOVE))),
    "enable_thinking": THINKING,
    **each("add_non_thinking_prefix response_prefix preserve_thinking", Refused(
        "answers are trained on as the model's template renders them")),
    **each("model_author model_name", IDENTITY),
    "val_dataset": Joined("evaluate.datasets"),
    **each("cached_dataset cached_val_dataset", Refused("import the files themselves: a dataset stage is cached in the store")),
    "columns": Joined("data.sources"),
    "new_special_tokens": to("train.add_tokens", by=names),
    "adalora_init_r": to("train.adalora.init_r", by=whole),
    "adalora_target_r": to("train.adalora.target_r", by=whole),
    "adalora_tinit": to("train.adalora.tinit", by=whole),
    "adalora_tfinal": to("train.adalora.tfinal", by=whole),
    "adalora_deltaT": to("train.adalora.deltaT", by=whole),
    "adalora_beta1": to("train.adalora.beta1", by=number),
    "adalora_beta2": to("train.adalora.beta2", by=number),
    "adalora_orth_reg_weight": to("train.adalora.orth_reg_weight", by=number),
    "vera_rank": to("train.vera.r", by=whole),
    "vera_dropout": to("train.vera.vera_dropout", by=number),
    "vera_d_initial": to("train.vera.d_initial", by=number),
    "vera_projection_prng_key": to("train.vera.projection_prng_key", by=whole),
    "use_hf": Without("models and data come from the Hugging Face hub"),
    **each("dataset_num_proc load_from_cache_file lazy_tokenize streaming shuffle_buffer_size packing_num_proc packing_strategy"
           " download_mode strict interleave_prob_seed dataset_shuffle val_dataset_shuffle train_dataloader_shuffle to_cached_dataset"
           " template_mode", Without("the dataset is an artifact in the store, its rows shuffled by the seed")),
    "interleave_prob": Joined("data.sources.weight"),
    **each("use_logits_to_keep experts_impl tuner_backend check_model add_version create_checkpoint_symlink load_args load_data_args"
           " acc_strategy device_map max_memory zero_hpz_partition_size ignore_args_error packing_length", Without(SPEED)),
    **each("bnb_4bit_compute_dtype", to("train.dtype", by=dtype)),
    "bnb_4bit_quant_type": same_if(("nf4",), "4 bits are always NF4", Refused("4 bits are always NF4")),
    "bnb_4bit_use_double_quant": Without("4 bits always use double quantization"),
    "bnb_4bit_quant_storage": Without("quantized weights are not sharded"),
    "max_model_len": Without("`max_length` limits the rows"),
    "rope_scaling": Refused("set it in the model's config.json"),
    "router_aux_loss_coef": NO_FIELD,
    "merge_lora": Joined("merge.adapters"),
    "max_shard_size": to("merge.max_shard_size", by=size),
    "quant_n_samples": to("quantize.samples", by=whole),
    "quant_batch_size": Without(SPEED),
    "group_size": to("quantize.group_size", by=whole),
    "predict_with_generate": Without("a stage of kind `evaluate` generates answers: `val_dataset` makes one"),
    "optimizer": to("train.optim", by=lambda value: {
        "muon": "muon", "lorap": Without("`lorap_lr_ratio` makes it LoRA+")}.get(value, OTHER_OPTIMIZER)),
    **each("optim_args use_galore galore_rank galore_target_modules galore_quantization galore_optim_per_parameter galore_scale"
           " galore_update_proj_gap lisa_activated_layers lisa_step_interval", OTHER_OPTIMIZER),
    **each("lora_ga_batch_size lora_ga_iters lora_ga_max_length lora_ga_direction lora_ga_scale lora_ga_stable_gamma"
           " llamapro_num_new_blocks llamapro_num_groups reft_intervention_type reft_layers reft_rank boft_block_size boft_block_num"
           " fourier_n_frequency adapter_act adapter_length freeze_parameters"
           " freeze_parameters_ratio freeze_parameters_regex trainable_parameters trainable_parameters_regex", OTHER_TUNER),
    **each("task_type num_labels problem_type", Refused("tuneline trains only causal language models")),
    **each("to_ollama to_mcore to_hf to_peft_format", Refused("an artifact is a folder that vLLM and transformers load")),
    **each("exist_ok", KEPT),
    **each("freeze_vit freeze_aligner", NO_VISION),
    **each("freeze_llm max_pixels norm_bbox vit_lr aligner_lr vit_gradient_checkpointing", MULTIMODAL),
    **each("tensor_model_parallel_size pipeline_model_parallel_size mcore_model mcore_adapter", MEGATRON),
    "enable_npu_model_patch": OTHER_CHIPS,
    "hub_revision": UPLOADS,
}  # fmt: skip
DEFAULTS = {
    "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "weight_decay": 0.1,
    "adam_beta2": 0.95, "gradient_checkpointing": True, "max_grad_norm": 1.0,
}  # fmt: skip
GRPO = {"beta": 0.04, "loss_type": "grpo", "temperature": 0.9, "max_completion_length": 512, "num_generations": 8, "epsilon": 0.2}
PREFERENCE = {"beta": 0.1}
