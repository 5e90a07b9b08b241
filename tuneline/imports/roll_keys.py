"""ROLL's keys: what becomes of each, and the defaults that differ from ours."""

from __future__ import annotations

import re

from tuneline.config.training_aliases import TEMPLATE
from tuneline.imports.fates import REMOVE, Joined, Refused, Table, Without, each, same_if, to
from tuneline.imports.huggingface import KEPT, LOGS, RESUMES, SPEED, TRAINING
from tuneline.imports.launch import FOR_RUN
from tuneline.imports.values import above, attention, dtype, kernels, modules, names, number, top_k, true, warmup, whole

TRAIN, INFER = "actor_train.", "actor_infer."
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
RANGE = re.compile(r"range\(\s*(?:(\d{1,5})\s*,\s*)?(\d{1,5})\s*\)")
ESTIMATORS = ("grpo", "reinforce")

TRAIN, INFER = "actor_train.", "actor_infer."
MODEL = Without("vLLM samples with the adapter of the model in training")
VALIDATES = Without("a stage of kind `evaluate` scores the finished model, greedily, on the files of `validation`")
REWARD = Without("a reward is a function here, without a model, a template or workers")
OTHER_RL = Refused("`grpo` has `loss_type`, `scale_rewards`, `importance_sampling_level`, `epsilon_high` and `beta`")
AGENTIC = Refused("a completion is one answer: environments of several turns are not offered")


TABLE: Table = {
    "pretrain": Joined("base.hub"),
    **each("reward_pretrain model_download_type", Without("rewards are functions; models come from the Hugging Face hub")),
    "seed": TRAINING["seed"],
    "max_steps": to("train.max_steps", by=above(0)),
    "save_steps": TRAINING["save_steps"],
    "max_grad_norm": to("train.max_grad_norm", by=number),
    **each("rollout_batch_size num_return_sequences_in_group", Joined("train.global_batch_size")),
    "prompt_length": to("data.max_length", by=whole),
    **each("response_length", to("train.max_completion_length", by=whole)),
    "ppo_epochs": to("train.num_iterations", by=whole),
    "adv_estimator": Joined("train.kind"),
    **each("pg_clip pg_clip_low", to("train.epsilon", by=number)),
    "pg_clip_high": to("train.epsilon_high", by=number),
    **each("use_kl_loss kl_loss_coef", Joined("train.beta")),
    **each("init_kl_coef kl_penalty kl_horizon target_kl lambd gamma", Without("it has no effect with grpo and without KL in the reward")),
    "add_token_level_kl": Refused("the KL divergence is a loss here: `beta`"),
    "max_len_mask": to("train.mask_truncated_completions", by=true),
    "norm_std_type": to("train.scale_rewards", by=lambda value: value if value in ("group", "batch") else "none"),
    "norm_mean_type": same_if(("group",), "advantages are relative to their group", OTHER_RL),
    "loss_agg_mode": to("train.loss_type", by=lambda value: {"token-mean": "dapo", "seq-mean-token-mean": "grpo"}.get(value, OTHER_RL)),
    **each("whiten_advantages difficulty_mask difficulty_loss_weight length_loss_weight error_max_len_clip dual_clip_loss advantage_clip"
           " reward_clip entropy_loss_coef whiten_rewards use_reward_scaling add_len_reward", OTHER_RL),
    **each("difficulty_low_threshold difficulty_high_threshold value_clip critic_warmup query_filter_config", Without(
        "grpo has neither a critic nor masks by difficulty")),
    **each("lora_target lora_rank lora_alpha defaults global_template", Without("other keys refer to it")),
    **each("eval_steps val_batch_size sequence_length", VALIDATES),
    "validation.data_args.file_name": Joined("evaluate.datasets"),
    "validation.*": VALIDATES,
    **each("exp_name logging_steps track_with render_save_dir", LOGS),
    **each("output_dir logging_dir", KEPT),
    "resume_from_checkpoint": RESUMES,
    **each("hydra.* tracker_kwargs.* checkpoint_config.*", Without("runs, checkpoints and logs have their places in the store")),
    "system_envs.*": Without(FOR_RUN),
    **each("num_gpus_per_node num_nodes", Joined("train.resources.gpus")),
    "reference.*": Without("the reference is the model with its adapter disabled"),
    "critic.*": Without("grpo has no critic"),
    "rewards.*": REWARD,
    **each("custom_envs.* train_env_manager.* val_env_manager.* reward_normalization.* max_tokens_per_step", AGENTIC),
    f"{TRAIN}model_args.lora_target": to("train.lora.target_modules", by=modules),
    f"{TRAIN}model_args.lora_rank": to("train.lora.r", by=whole),
    f"{TRAIN}model_args.lora_alpha": to("train.lora.lora_alpha", by=number),
    f"{TRAIN}model_args.lora_dropout": to("train.lora.lora_dropout", by=number),
    f"{TRAIN}model_args.additional_target": to("train.lora.modules_to_save", by=names),
    f"{TRAIN}model_args.attn_implementation": to("train.resources.attn_implementation", by=attention),
    f"{TRAIN}model_args.disable_gradient_checkpointing": to("train.resources.gradient_checkpointing", by=lambda value: not true(value)),
    f"{TRAIN}model_args.dtype": to("train.dtype", by=dtype),
    f"{TRAIN}model_args.model_type": Without("every model is a causal language model"),
    f"{TRAIN}model_args.freeze_module_prefix": Refused("tuneline trains text models only"),
    f"{TRAIN}training_args.learning_rate": to("train.learning_rate", by=number),
    f"{TRAIN}training_args.weight_decay": to("train.weight_decay", by=number),
    f"{TRAIN}training_args.warmup_steps": to("train.warmup_steps", by=warmup),
    f"{TRAIN}training_args.warmup_ratio": to("train.warmup_steps", by=warmup),
    f"{TRAIN}training_args.lr_scheduler_type": to("train.lr_scheduler_type", by=str),
    f"{TRAIN}training_args.num_train_epochs": Without("`max_steps` ends the training"),
    **each(f"{TRAIN}training_args.per_device_train_batch_size {TRAIN}training_args.gradient_accumulation_steps", (
        Joined("train.global_batch_size"))),
    f"{TRAIN}data_args.template": Without(TEMPLATE.removeprefix(REMOVE)),
    **each(f"{TRAIN}data_args.file_name {TRAIN}data_args.dataset_dir {TRAIN}data_args.messages {TRAIN}data_args.prompt", (
        Joined("data.sources"))),
    f"{TRAIN}data_args.preprocessing_num_workers": Without(SPEED),
    **each(f"{TRAIN}data_args.interleave_probs {TRAIN}data_args.domain_interleave_probs.*", Refused(
        "write `weight:` in each of `sources:`")),
    f"{TRAIN}strategy_args.*": Joined("train.resources.strategy"),
    f"{TRAIN}device_mapping": Joined("train.resources.gpus"),
    f"{TRAIN}infer_batch_size": Without(SPEED),
    f"{TRAIN}use_liger_kernel": to("train.resources.kernels", by=kernels),
    f"{INFER}generating_args.temperature": to("train.temperature", by=number),
    f"{INFER}generating_args.top_p": to("train.top_p", by=number),
    f"{INFER}generating_args.top_k": to("train.top_k", by=top_k),
    f"{INFER}generating_args.max_new_tokens": to("train.max_completion_length", by=whole),
    f"{INFER}generating_args.num_return_sequences": Joined("train.num_generations"),
    f"{INFER}generating_args.num_beams": Without("completions are sampled"),
    f"{INFER}strategy_args.strategy_name": to("train.rollouts.engine", by=lambda value: {"vllm": "vllm", "hf_infer": "transformers"}.get(
        value, Refused("write `rollouts: {engine: vllm}`, or transformers"))),
    f"{INFER}strategy_args.strategy_config.gpu_memory_utilization": to("train.resources.engine.gpu_memory_utilization", by=number),
    f"{INFER}strategy_args.strategy_config.max_model_len": to("train.resources.engine.max_model_len", by=whole),
    f"{INFER}strategy_args.strategy_config.block_size": to("train.resources.engine.block_size", by=whole),
    f"{INFER}strategy_args.strategy_config.enforce_eager": to("train.resources.engine.enforce_eager", by=true),
    f"{INFER}strategy_args.strategy_config.max_num_seqs": to("train.resources.engine.max_num_seqs", by=whole),
    f"{INFER}*": MODEL,
}  # fmt: skip
DEFAULTS = {
    f"{TRAIN}model_args.dtype": "bf16",
    "max_steps": 500,
    "max_grad_norm": 1.0,
    f"{TRAIN}model_args.disable_gradient_checkpointing": False,
}
