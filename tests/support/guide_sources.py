"""Small inputs with the keys of the five guides' examples: files by name, and what `tuneline import` gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Guide:
    files: dict[str, str]
    sources: tuple[str, ...]
    training: str
    """Name of the training stage."""

    def write(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


LLAMA_FACTORY = """\
model_name_or_path: owner/llama
dataset: questions
template: llama3
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target: all
num_train_epochs: 3
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
learning_rate: 5e-5
weight_decay: 0.01
warmup_ratio: 0.1
cutoff_len: 512
output_dir: ./output/lora
logging_steps: 10
"""
LLAMA_FACTORY_EXPORT = """\
llamafactory-cli export \\
  --model_name_or_path owner/llama \\
  --adapter_name_or_path ./output/lora \\
  --export_dir ./output/merged \\
  --export_size 2 \\
  --export_device cpu
"""
SWIFT = """\
# four processes
MODEL=owner/qwen
CUDA_VISIBLE_DEVICES=0,1,2,3 \\
NPROC_PER_NODE=4 \\
swift sft \\
    --model $MODEL \\
    --train_type lora \\
    --dataset 'owner/rows#500' \\
    --torch_dtype bfloat16 \\
    --attn_impl flash_attn \\
    --target_modules '[q_proj,k_proj,v_proj,o_proj]' \\
    --lora_rank 8 \\
    --lora_alpha 32 \\
    --max_length 512 \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 2 \\
    --deepspeed zero2 \\
    --split_dataset_ratio 0.1 \\
    --eval_steps 50 \\
    --save_steps 50 \\
    --output_dir output/sft \\
    --gradient_checkpointing_kwargs '{"use_reentrant": false}'
swift export \\
    --adapters output/sft/v0-1/checkpoint-10 \\
    --merge_lora true
"""
ROLL = """\
pretrain: owner/qwen
seed: 42
max_steps: 100
lora_target: o_proj,q_proj,k_proj,v_proj
lora_rank: 32
lora_alpha: 32
rollout_batch_size: 8
num_return_sequences_in_group: 4
response_length: 64
prompt_length: 128
adv_estimator: grpo
actor_train:
  model_args:
    attn_implementation: fa2
    disable_gradient_checkpointing: true
    dtype: bf16
    lora_target: ${lora_target}
    lora_rank: ${lora_rank}
    lora_alpha: ${lora_alpha}
    model_type: ~
  training_args:
    learning_rate: 1.0e-5
    weight_decay: 0
    per_device_train_batch_size: 1
    gradient_accumulation_steps: 32
    warmup_steps: 20
    num_train_epochs: 50
  data_args:
    file_name: [data/math.jsonl]
    messages: messages
  strategy_args:
    strategy_name: deepspeed_train
    strategy_config: ${deepspeed_zero3}
  device_mapping: list(range(0,16))
  infer_batch_size: 4
actor_infer:
  model_args:
    lora_target: ${lora_target}
  generating_args:
    max_new_tokens: ${response_length}
    top_p: 0.99
    top_k: 100
    num_beams: 1
    temperature: 0.99
    num_return_sequences: ${num_return_sequences_in_group}
  strategy_args:
    strategy_name: vllm
    strategy_config: {gpu_memory_utilization: 0.6, enforce_eager: false, block_size: 16, max_model_len: 8000}
  device_mapping: list(range(0,12))
  infer_batch_size: 1
rewards:
  math_rule:
    worker_cls: roll.pipeline.rlvr.rewards.math_rule_reward_worker.MathRuleRewardWorker
"""
VERL = """\
set -x
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/data/train.parquet \\
    data.train_batch_size=64 \\
    data.max_prompt_length=512 \\
    data.max_response_length=128 \\
    actor_rollout_ref.model.path=owner/qwen \\
    actor_rollout_ref.model.use_shm=True \\
    actor_rollout_ref.model.lora_rank=32 \\
    actor_rollout_ref.model.lora_alpha=32 \\
    actor_rollout_ref.model.target_modules=all-linear \\
    actor_rollout_ref.actor.optim.lr=3e-5 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=5 \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    actor_rollout_ref.actor.fsdp_config.fsdp_size=8 \\
    actor_rollout_ref.actor.fsdp_config.param_offload=True \\
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=8 \\
    actor_rollout_ref.rollout.name=vllm \\
    actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \\
    actor_rollout_ref.rollout.n=5 \\
    actor_rollout_ref.rollout.max_num_seqs=64 \\
    actor_rollout_ref.rollout.max_model_len=1536 \\
    actor_rollout_ref.rollout.load_format=safetensors \\
    actor_rollout_ref.rollout.layered_summon=True \\
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=1 \\
    trainer.n_gpus_per_node=8 \\
    trainer.logger='["console"]' $@
"""
SCRIPT = """\
#!/bin/bash
MODEL_PATH="/models/qwen"
DATA_PATH="../data/rows.jsonl"
OUTPUT_DIR="../models/qwen-lora"
LORA_R=16
LORA_ALPHA=32
LORA_DROPOUT=0.05
TARGET_MODULES="q_proj,v_proj,k_proj,o_proj"
LEARNING_RATE=1e-4
BATCH_SIZE=4
NUM_EPOCHS=3
python finetuning_lora.py --model_path "$MODEL_PATH" --data_path "$DATA_PATH" --output_dir "$OUTPUT_DIR" \\
    --lora_r $LORA_R --lora_alpha $LORA_ALPHA --lora_dropout $LORA_DROPOUT --target_modules "$TARGET_MODULES" \\
    --learning_rate $LEARNING_RATE --load_in_8bit true
"""
INFO = '{"questions": {"file_name": "questions.json", "columns": {"prompt": "question", "response": "answer"}}}'
GUIDES = {
    "llama-factory": Guide(
        {"train.yaml": LLAMA_FACTORY, "merge.sh": LLAMA_FACTORY_EXPORT, "data/dataset_info.json": INFO}, ("train.yaml", "merge.sh"), "sft"
    ),
    "ms-swift": Guide({"train.sh": SWIFT}, ("train.sh",), "sft"),
    "roll": Guide({"rlvr.yaml": ROLL}, ("rlvr.yaml",), "grpo"),
    "verl": Guide({"run.sh": VERL}, ("run.sh",), "grpo"),
    "lora-scripts": Guide({"scripts/run_finetuning_lora.sh": SCRIPT}, ("scripts/run_finetuning_lora.sh",), "sft"),
}
