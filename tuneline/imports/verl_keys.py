"""verl's keys: what becomes of each, and the defaults of its configurations."""

from __future__ import annotations

from tuneline.config.training_aliases import TEMPLATE
from tuneline.imports.fates import REMOVE, Joined, Refused, Table, Without, each, same_if, to
from tuneline.imports.huggingface import KEPT, LOGS, MEGATRON, OTHER_CHIPS, RESUMES, SAVES, SPEED, TRAINING
from tuneline.imports.rl import SEPARATE
from tuneline.imports.values import above, kernels, modules, names, number, top_k, true, warmup, whole

A, R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
M, F = "actor_rollout_ref.model.", "actor_rollout_ref.actor.fsdp_config."
LOSSES = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}
ESTIMATORS = ("grpo", "grpo_vectorized", "dr_grpo")
EVALUATES = Without("a stage of kind `evaluate` scores the finished model on `data.val_files`")
SERVER = Without("vLLM is a server of its own: `resources: {engine: ...}` has its settings")
ENTROPY = Refused("grpo has no entropy bonus")


def _prefixed(prefix: str, table: Table) -> Table:
    return {f"{prefix}{key}": fate for key, fate in table.items()}


RL: Table = {
    "algorithm.adv_estimator": Joined("train.kind"),
    "algorithm.use_kl_in_reward": Refused("the KL divergence is a loss here: `beta`"),
    **each("algorithm.kl_ctrl.kl_coef algorithm.kl_ctrl.type algorithm.gamma algorithm.lam algorithm.kl_penalty", Without(
        "it has no effect with grpo and without KL in the reward")),
    "algorithm.norm_adv_by_std_in_grpo": to("train.scale_rewards", by=lambda value: "group" if true(value) else "none"),
    **each("data.train_files data.prompt_key", Joined("data.sources")),
    "data.val_files": Joined("evaluate.datasets"),
    **each(f"data.train_batch_size {A}ppo_mini_batch_size {R}n", Joined("train.global_batch_size")),
    **each(f"{A}ppo_micro_batch_size_per_gpu {A}ppo_micro_batch_size", Joined("train.resources.micro_batch_size")),
    "data.max_prompt_length": to("data.max_length", by=whole),
    "data.max_response_length": to("train.max_completion_length", by=whole),
    "data.filter_overlong_prompts": Without("prompts longer than max_length are dropped and counted"),
    "data.truncation": Without("prompts longer than max_length are dropped and counted, never truncated"),
    "data.apply_chat_template_kwargs.enable_thinking": to("base.chat_template_kwargs.enable_thinking", by=true),
    "data.seed": to("data.seed", by=whole),
    "data.shuffle": same_if((True,), "rows are shuffled by the seed", Refused(
        "rows are always shuffled, by the stage's `seed`", even_off=True)),
    "data.train_max_samples": Joined("data.sources"),
    **each("data.val_batch_size data.val_max_samples trainer.test_freq trainer.val_before_train", EVALUATES),
    **_prefixed(M, {
        "path": Joined("base.hub"),
        "lora_rank": to("train.lora.r", by=lambda value: whole(value) or Refused(
            "grpo trains a LoRA adapter, not all weights: write `lora: {r: 32}` or more")),
        "lora_alpha": to("train.lora.lora_alpha", by=number),
        "target_modules": to("train.lora.target_modules", by=modules),
        "exclude_modules": to("train.lora.exclude_modules", by=names),
        "lora_adapter_path": Joined("train.adapter"),
        "enable_gradient_checkpointing": to("train.resources.gradient_checkpointing", by=true),
        "enable_activation_offload": to("train.resources.activation_offloading", by=true),
        "trust_remote_code": to("base.trust_remote_code", by=true),
        "use_liger": to("train.resources.kernels", by=kernels),
        **each("use_shm use_remove_padding use_fused_kernels external_lib", Without(SPEED)),
        "custom_chat_template": Without(TEMPLATE.removeprefix(REMOVE)),
    }),
    **_prefixed(A, {
        "optim.lr": to("train.learning_rate", by=number),
        "optim.weight_decay": to("train.weight_decay", by=number),
        "optim.lr_warmup_steps_ratio": to("train.warmup_steps", by=warmup),
        "optim.lr_warmup_steps": to("train.warmup_steps", by=above(0)),
        **each("optim.warmup_style optim.lr_scheduler_type", to("train.lr_scheduler_type", by=str)),
        **each("grad_clip optim.clip_grad", to("train.max_grad_norm", by=number)),
        "use_kl_loss": Joined("train.beta"),
        "kl_loss_coef": Joined("train.beta"),
        "kl_loss_type": same_if(("low_var_kl", "k3"), "the low-variance estimate (k3) is what is computed", Refused(
            "the KL divergence is always estimated by k3 (low_var_kl)")),
        "entropy_coeff": ENTROPY,
        **each("clip_ratio clip_ratio_low", to("train.epsilon", by=number)),
        "clip_ratio_high": to("train.epsilon_high", by=number),
        "clip_ratio_c": Refused("the loss has no second clipping"),
        "loss_agg_mode": to("train.loss_type", by=lambda value: LOSSES.get(value, Refused("write `loss_type: dapo`, grpo or dr_grpo"))),
        "policy_loss.loss_mode": to("train.importance_sampling_level", by=lambda value: Without("it is what trains") if value == "vanilla"
                                    else "sequence" if value == "gspo" else Refused("write `loss_type:` and `importance_sampling_level:`")),
        "ppo_epochs": to("train.num_iterations", by=whole),
        "ulysses_sequence_parallel_size": to("train.resources.sequence_parallel_size", by=whole),
        **each("strategy fsdp_config.param_offload fsdp_config.optimizer_offload", Joined("train.resources.strategy")),
        **each("fsdp_config.fsdp_size fsdp_config.reshard_after_forward fsdp_config.forward_prefetch fsdp_config.wrap_policy"
               " use_dynamic_bsz ppo_max_token_len_per_gpu use_torch_compile fsdp_config.model_dtype", Without(SPEED)),
        "megatron.tensor_model_parallel_size": MEGATRON,
    }),
    **_prefixed(R, {
        "name": to("train.rollouts.engine", by=lambda value: {"vllm": "vllm", "hf": "transformers"}.get(
            value, Refused("write `rollouts: {engine: vllm}`, or transformers"))),
        "temperature": to("train.temperature", by=number),
        "top_p": to("train.top_p", by=number),
        "top_k": to("train.top_k", by=top_k),
        "gpu_memory_utilization": to("train.resources.engine.gpu_memory_utilization", by=number),
        "max_model_len": to("train.resources.engine.max_model_len", by=whole),
        "max_num_seqs": to("train.resources.engine.max_num_seqs", by=whole),
        "enforce_eager": to("train.resources.engine.enforce_eager", by=true),
        "tensor_model_parallel_size": SEPARATE,
        "load_format": Without("vLLM reads the base model's safetensors"),
        **each("layered_summon max_num_batched_tokens enable_chunked_prefill free_cache_engine log_prob_micro_batch_size"
               " log_prob_micro_batch_size_per_gpu log_prob_use_dynamic_bsz enable_prefix_caching mode dtype disable_log_stats", SERVER),
    }),
    **each("actor_rollout_ref.ref.fsdp_config.param_offload actor_rollout_ref.ref.log_prob_micro_batch_size"
           " actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu actor_rollout_ref.ref.log_prob_use_dynamic_bsz"
           " actor_rollout_ref.hybrid_engine", Without("the reference is the model with its adapter disabled")),
    **each("custom_reward_function.path custom_reward_function.name reward_model.reward_manager", Joined("train.rewards")),
    "reward_model.enable": Refused("rewards are functions: docs/rewards.md"),
    "trainer.critic_warmup": Without("grpo has no critic"),
}  # fmt: skip
SFT: Table = {
    "model.partial_pretrain": Joined("base.hub"),
    **each("data.train_files data.prompt_key data.response_key data.multiturn.enable", Joined("data.sources")),
    **each("data.prompt_dict_keys data.response_dict_keys", Refused("name a column with the text itself in `columns:`")),
    "data.val_files": Joined("evaluate.datasets"),
    **each("data.train_batch_size", to("train.global_batch_size", by=whole)),
    **each("data.micro_batch_size_per_gpu data.micro_batch_size", to("train.resources.micro_batch_size", by=whole)),
    "data.max_length": to("train.max_length", "data.max_length", by=whole),
    "data.truncation": Without("rows longer than max_length are dropped and counted"),
    "model.lora_rank": Joined("train.lora.r"),
    "model.lora_alpha": to("train.lora.lora_alpha", by=number),
    "model.target_modules": to("train.lora.target_modules", by=modules),
    "model.enable_gradient_checkpointing": to("train.resources.gradient_checkpointing", by=true),
    "model.trust_remote_code": to("base.trust_remote_code", by=true),
    "model.use_liger": to("train.resources.kernels", by=kernels),
    **each("model.strategy model.fsdp_config.cpu_offload model.fsdp_config.offload_params", Without(
        "`resources: {strategy: fsdp}` shards a model that exceeds a GPU")),
    "optim.lr": to("train.learning_rate", by=number),
    "optim.weight_decay": to("train.weight_decay", by=number),
    **each("optim.warmup_steps_ratio optim.lr_warmup_steps_ratio", to("train.warmup_steps", by=warmup)),
    "optim.clip_grad": to("train.max_grad_norm", by=number),
    "optim.lr_scheduler": to("train.lr_scheduler_type", by=str),
    "ulysses_sequence_parallel_size": to("train.resources.sequence_parallel_size", by=whole),
    **each("use_remove_padding data.balance_dp_token data.use_shm model.use_shm", Without(SPEED)),
}  # fmt: skip
TRAINER: Table = {
    "trainer.total_epochs": to("train.num_train_epochs", by=number),
    **each("trainer.total_training_steps", to("train.max_steps", by=above(0))),
    **each("trainer.n_gpus_per_node trainer.nnodes", Joined("train.resources.gpus")),
    "trainer.save_freq": to("train.resources.checkpoint_steps", by=lambda value: whole(value) if number(value) > 0 else SAVES),
    "trainer.seed": to("train.seed", "data.seed", by=whole),
    **each("trainer.max_actor_ckpt_to_keep trainer.max_ckpt_to_keep trainer.del_local_ckpt_after_load", SAVES),
    "trainer.logger": TRAINING["report_to"],
    **each("trainer.project_name trainer.experiment_name trainer.log_val_generations", LOGS),
    **each("trainer.default_local_dir trainer.default_hdfs_dir trainer.rollout_data_dir trainer.validation_data_dir", KEPT),
    **each("trainer.resume_mode trainer.resume_from_path", RESUMES),
    **each("trainer.balance_batch trainer.ray_wait_register_center_timeout trainer.use_legacy_worker_impl", Without(SPEED)),
    "trainer.device": same_if(("cuda", "cpu"), "`resources: {gpus: 1}` decides it", OTHER_CHIPS),
    **each("trainer.test_freq trainer.val_before_train", EVALUATES),
}  # fmt: skip
TABLE: Table = {**SFT, **RL, **TRAINER}
RL_DEFAULTS = {
    f"{A}optim.lr": 1e-6, f"{A}optim.weight_decay": 0.01, "data.max_prompt_length": 512, "data.max_response_length": 512,
    "trainer.total_epochs": 30, f"{M}lora_alpha": 16, f"{M}enable_gradient_checkpointing": True, f"{A}optim.lr_scheduler_type": "constant",
    f"{R}name": "vllm", f"{R}gpu_memory_utilization": 0.5,
}  # fmt: skip
SFT_DEFAULTS = {
    "optim.lr": 1e-5, "optim.weight_decay": 0.01, "optim.lr_scheduler": "cosine", "optim.lr_warmup_steps_ratio": 0.1,
    "data.max_length": 1024, "trainer.total_epochs": 4, "data.train_batch_size": 256, "model.lora_alpha": 16,
    "model.enable_gradient_checkpointing": True,
}  # fmt: skip
