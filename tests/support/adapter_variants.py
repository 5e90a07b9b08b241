"""Every kind of adapter and of first weights, as fields of a training."""

from __future__ import annotations

from typing import Any

LORA = {"r": 4, "lora_alpha": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"lora": LORA},
    "attention": {"lora": {**LORA, "target_modules": "attention", "layers_to_transform": [1]}},
    "expression": {"lora": {**LORA, "target_modules": r".*\.(q|v)_proj", "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"0.self_attn.v_proj": 4}}},
    "gaussian": {"lora": {**LORA, "init_lora_weights": "gaussian", "exclude_modules": ["down_proj"]}},
    "pissa": {"lora": {**LORA, "init_lora_weights": "pissa", "lora_dropout": 0.1}},
    "pissa_niter_4": {"lora": {**LORA, "init_lora_weights": "pissa_niter_4", "rank_pattern": {"down_proj": 8}}},
    "olora": {"lora": {**LORA, "init_lora_weights": "olora", "use_rslora": True}},
    "lora+": {"lora": {**LORA, "lora_plus_ratio": 8}, "learning_rate": 1e-3, "weight_decay": 0.1},
    "adalora": {"adalora": {"init_r": 6, "target_r": 3, "lora_alpha": 32, "lora_dropout": 0.1, "tinit": 1, "tfinal": 2, "deltaT": 2}, "learning_rate": 2e-2},
    "vera": {"vera": {"r": 32, "vera_dropout": 0.1}, "learning_rate": 5e-2},
    "vera, drawn again": {"vera": {"r": 32, "save_projection": False}, "learning_rate": 5e-2},
    "oft": {"oft": {"oft_block_size": 16, "target_modules": "attention"}},
    "ia3": {"ia3": {"modules_to_save": ["model.norm"]}, "learning_rate": 5e-2},
    "modules": {"lora": {**LORA, "modules_to_save": ["model.norm", "embed_tokens"]}},
    "tokens": {"lora": LORA, "add_tokens": ["of course", "<sum>"]},
    "tokens, untied": {"lora": LORA, "add_tokens": ["of course", "<sum>"]},
    "modules, untied": {"lora": {**LORA, "modules_to_save": ["lm_head"], "init_lora_weights": "olora"}},
    "eva": {"lora": {**LORA, "init_lora_weights": "eva", "lora_dropout": 0.1}},
}  # fmt: skip
