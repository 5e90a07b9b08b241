"""Kinds, values and whole files of other tools, and examples for hints. Only data: `hints.py` reads it."""

from __future__ import annotations

OTHER_VALUES = {  # values that other tools allow, by field
    ("loss_type", "orpo"): "tuneline has only losses with a reference model",
    ("loss_type", "simpo"): "tuneline has only losses with a reference model",
    ("loss_type", "sft"): "write `rpo_alpha: 1`, which adds it to the loss of pairs",
    ("loss_type", "bnpo"): "write `dapo`, which averages over the tokens of the whole batch; bnpo averages over a micro-batch, whose size"
    " must not change a result",
    **{("method", name): "write `full`" for name in ("fft", "full_parameter")},
    **{("method", name): "write `lora`, and `lora: {use_dora: true}`" for name in ("dora",)},
    **{("dtype", name): "write `bfloat16`" for name in ("bf16",)},
    **{("dtype", name): "write `float32`" for name in ("fp32", "float")},
    **{("dtype", name): "write `bfloat16`: float16 is not offered" for name in ("fp16", "float16", "half")},
    **{("optim", name): "write `adamw`, the default" for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")},
    **{("optim", name): "write `adamw_8bit`" for name in ("adamw_bnb_8bit", "adamw_torch_8bit")},
    **{("optim", name): "write `lion`" for name in ("lion_32bit", "lion_8bit", "paged_lion_32bit", "lion_pytorch")},
    **{("attn_implementation", name): "write `flash_attention_2`" for name in ("fa2", "flash_attn", "flash_attention")},
    **{("attn_implementation", name): "write `flash_attention_3`" for name in ("fa3", "flash_attn_3")},
    **{("strategy", name): "write `zero3`" for name in ("deepspeed", "zero", "zero-3", "ds_z3_config.json")},
    **{
        ("train_on", name): "write `train_on: {last: 2}`, or completion for the last answer alone"
        for name in ("last", "last_n", "last_round")
    },
    **{("train_on", name): "write `assistant`" for name in ("default", "answers", "responses")},
    **{("format", name): "write `messages`" for name in ("chat_template", "openai", "chatml", "conversation")},
    **{("format", name): "write `auto`: the type of a file follows from its name" for name in ("json", "jsonl", "csv", "parquet")},
}

ABSENT_KINDS = {  # what other tools train or do, and tuneline does not
    **dict.fromkeys(("orpo", "simpo", "cpo"), (
        "tuneline has no preference training without a reference model; `dpo` trains on pairs of answers, `kto` on labeled ones"
    )),
    **dict.fromkeys(("reward", "rewardmodel", "rewardmodeling", "rm", "prm"), (
        "tuneline trains no reward models yet; `grpo` takes reward functions under `rewards:`"
    )),
    **dict.fromkeys(("ppo", "rloo", "rlhf", "reinforce", "onlinedpo"), (
        "tuneline has none yet; its reinforcement learning is `grpo`, on reward functions instead of a reward model"
    )),
    **dict.fromkeys(("distill", "distillation", "gkd", "kd"), "tuneline has no distillation yet; `sft` trains on answers in a dataset"),
    **dict.fromkeys(("embedding", "embeddings", "reranker", "classification"), "tuneline trains only causal language models"),
    **dict.fromkeys(("serve", "deploy", "chat", "infer", "inference", "predict", "generate"), (
        "no stage: the commands `tuneline chat` and `tuneline serve` use what a pipeline has built"
    )),
    **dict.fromkeys(("shell", "script", "command", "python", "bash"), "tuneline runs no commands; docs/adding-a-stage.md adds a kind"),
}  # fmt: skip

FOREIGN = {  # top-level keys of the configurations of other tools, the clearest first
    "LLaMA-Factory": (
        "finetuning_type", "cutoff_len", "dataset_dir", "template", "stage", "model_name_or_path", "lora_target", "lora_rank", "val_size",
        "export_dir", "adapter_name_or_path", "do_train", "plot_loss", "overwrite_cache",
    ),
    "axolotl": (
        "base_model", "sequence_len", "micro_batch_size", "adapter", "datasets", "val_set_size", "sample_packing", "lora_r", "load_in_4bit",
        "load_in_8bit", "tokenizer_type", "model_type", "dataset_prepared_path", "special_tokens", "num_epochs", "flash_attention",
    ),
    "ms-swift": (
        "train_type", "tuner_type", "model", "dataset", "torch_dtype", "rlhf_type", "split_dataset_ratio", "attn_impl", "quant_bits",
        "use_hf", "infer_backend", "target_modules", "swift",
    ),
    "TRL": (
        "dataset_name", "use_peft", "model_name_or_path", "lora_target_modules", "dataset_text_field", "max_seq_length", "reward_funcs",
        "per_device_train_batch_size", "dataset_config", "attn_implementation",
    ),
    "ROLL": (
        "actor_train", "actor_infer", "rollout_batch_size", "pretrain", "num_return_sequences_in_group", "reward_pretrain", "adv_estimator",
        "ppo_epochs", "track_with", "exp_name", "whiten_advantages",
    ),
    "torchtune": ("tokenizer", "checkpointer", "metric_logger", "profiler", "model", "dataset", "optimizer", "loss"),
    "mergekit": ("merge_method", "slices", "models", "base_model", "tokenizer_source", "parameters"),
    "DVC": ("stages", "params", "metrics", "plots", "artifacts"),
}  # fmt: skip

IMPORTED = ("LLaMA-Factory", "axolotl", "ms-swift", "TRL", "ROLL")  # whose files `tuneline import` reads
METHODS = ("lora", "qlora", "dora", "full", "none", "")
BENCHMARKS = ("mmlu", "gsm8k", "hellaswag", "winogrande", "piqa", "ifeval", "bbh", "boolq", "triviaqa", "humaneval", "mbpp", "openbookqa")
SOURCE_TYPES = {  # what other tools write as the type of a dataset
    **dict.fromkeys(("json", "jsonl", "csv", "parquet", "local", "text", "arrow"), "{type: files, path: rows.jsonl}"),
    **dict.fromkeys(("chat_template", "openai", "chatml", "conversation"), "{type: files, format: messages, path: rows.jsonl}"),
    "completion": "{type: files, format: text, path: rows.jsonl}",
    **dict.fromkeys(("huggingface", "hf", "hf_hub", "huggingface_hub", "dataset"), "{type: hub, repo: owner/name}"),
    **dict.fromkeys(("git", "source", "repository", "folder"), "{type: code, path: src}"),
}
EXAMPLES = {  # values for `add ...`, by field; those that name a stage take one of the pipeline if there is one
    "pipelines": "{demo: {stages: {base: {kind: model, hub: owner/name}}}}",
    "stages": "{base: {kind: model, hub: owner/name}}",
    "model": "base",
    "dataset": "data",
    "calibration": "data",
    "adapters": "[sft]",
    "of": "eval",
    "sources": "[{type: files, path: rows.jsonl}]",
    "path": "rows.jsonl",
    "repo": "owner/name",
    "task": "chain_sum",
    "rewards": "[{type: exact_match}]",
    "require": "[{metric: data/exact_match, of: eval, at_least: 0.5}]",
    "metric": "data/exact_match",
    "pattern": "'<answer>.*</answer>'",
    "file": "rewards.py",
    "function": "my_reward",
    "full_up_to": "100",
    "zero_from": "200",
    "image": "registry.example/tuneline:latest",
    "priority": "1",
    "last": "2",
    "key": "nvidia.com/gpu",
}
SHAPES = {  # how to write a field whose value is not a mapping or not a list
    "stages": "NAME: {kind: ...}",
    "pipelines": "NAME: {stages: ...}",
    "split": "{test: 0.1}",
    "lora": "{r: 16}",
    "resources": "{gpus: 1}",
    "early_stopping": "{patience: 3}",
    "train_on": "{last: 2}",
    "chat_template_kwargs": "{enable_thinking: false}",
    "rollouts": "{engine: vllm}",
    "vars": "{NAME: VALUE}",
    "require": "{metric: data/exact_match, of: eval, at_least: 0.5}",
    "columns": "{prompt: question, completion: solution}",
}
