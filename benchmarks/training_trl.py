"""The training of benchmarks/training.py as a plain TRL script, for comparison with tuneline's sft stage.

    <python of the torch runtime> benchmarks/training_trl.py MODEL ROWS.jsonl OUT

TRL's defaults, but for what the stage has as well: its batch, rate, steps and seed, no weight decay, float32, no activation checkpointing.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

model, rows, out = sys.argv[1:]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    args=SFTConfig(
        output_dir=out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-4,
        max_steps=8,
        seed=0,
        data_seed=0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
