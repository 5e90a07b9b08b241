"""Makes files that transformers 5 writes readable for older tools: transformers 4.57, and tools that use its keys (vLLM, SGLang,
llama.cpp, MLX).

transformers 5 moved `rope_theta` and `rope_scaling` of config.json into `rope_parameters`. 4.57 silently uses its own default for a
missing key: a theta of 10000 instead of 1e6. tokenizer_config.json names classes that only version 5 has: 4.57 refuses them.
So the older keys are added. Existing keys stay, and version 5 reads the same values with them.

Source: configuration and tokenizer classes of transformers 4.57.6 and 5.23, which tests/program/test_older_readers.py compares.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

# 4.57's names, where they differ, for theta, for the rotated share of a head, and for the theta of layers with sliding attention.
THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base", "modernbert-decoder": "global_rope_theta"}
SHARE = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
LOCAL_THETA = {"modernbert-decoder": "local_rope_theta"}
# 4.57 refuses any other key in these models' scaling.
SCALING = dict.fromkeys(("phi3", "phi4_multimodal"), ("type", "short_factor", "long_factor"))
# Version 5 reads both names and writes one that 4.57 does not know: the name of a number, and names of layer types in a list.
NAMES = {"qwen3_moe": {"num_local_experts": "num_experts"}}
LAYERS = {"granitemoehybrid": "layer_types", "zamba": "layers_block_type", "zamba2": "layers_block_type"}
FLOAT = "__float__"
LAYER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
DEFAULTS = ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces")  # differ between tokenizer classes


def readable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with 4.57's keys beside version 5's. Unchanged if version 5 would refuse it or read another value."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING or "auto_map" in config:  # the model's own code reads it
        return config
    config = with_floats(config)  # only version 5 reads the other form
    added = with_older_keys(config)
    try:
        before, after = (CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(each)).to_dict() for each in (config, added))
    except Exception:  # validators raise many types, for example for Gemma 4's scaling, which only version 5 knows
        return config
    return added if all(after.get(name) == value for name, value in before.items()) else config


def with_floats(value: Any) -> Any:
    """Write `Infinity`, which both read, for version 5's `{"__float__": "Infinity"}`, which 4.57 does not read."""
    if isinstance(value, dict):
        return float(value[FLOAT]) if value.keys() == {FLOAT} else {name: with_floats(item) for name, item in value.items()}
    return [with_floats(item) for item in value] if isinstance(value, list) else value


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    found = {name: with_older_keys(value) if is_config(value) else value for name, value in config.items()}
    kind = str(found.get("model_type"))
    if isinstance(found.get("dtype"), str):
        found.setdefault("torch_dtype", found["dtype"])
    if rope := found.get("rope_parameters"):
        for name, value in older_rope(rope, found).items():
            if found.get(name) is None:
                found[name] = value
    for theirs, older in NAMES.get(kind, {}).items():
        if theirs in found:
            found.setdefault(older, found[theirs])
    if found.get(LAYERS.get(kind, "")):
        found[LAYERS[kind]] = [LAYER_NAMES.get(layer, layer) for layer in found[LAYERS[kind]]]
    return found


def is_config(value: Any) -> bool:
    return isinstance(value, dict) and ("model_type" in value or "rope_parameters" in value)


def older_rope(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that replace `rope_parameters`. If layer types have their own, the model's are those of full attention."""
    kind, whole = str(config.get("model_type")), rope.get("full_attention") or rope
    found = {THETA.get(kind, "rope_theta"): whole.get("rope_theta")}
    if "partial_rotary_factor" in whole:
        found[SHARE.get(kind, "partial_rotary_factor")] = whole["partial_rotary_factor"]
    if local := rope.get("sliding_attention"):
        found[LOCAL_THETA.get(kind, "rope_local_base_freq")] = local.get("rope_theta")
    scaling = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if all(value == "default" for value in scaling.values()):
        return found | {"rope_scaling": None}
    if scaling.get("rope_type") == "longrope":  # 4.57 reads it from the top level and computes the factor
        context = scaling.pop("original_max_position_embeddings", None)
        if context and scaling.get("factor") in (None, config["max_position_embeddings"] / context):
            found["original_max_position_embeddings"] = context
    if kind in SCALING:
        scaling = {name: value for name, value in {**scaling, "type": scaling["rope_type"]}.items() if name in SCALING[kind]}
    return found | {"rope_scaling": scaling}


def make_tokenizer_readable(folder: Path) -> None:
    """Rewrite the tokenizer_config.json that transformers 5 saved into a folder. Files of earlier versions are left unchanged.

    Makes every reader use tokenizer.json unchanged: 4.57's class for a model would apply its own defaults, such as a beginning
    that it adds to texts. Defaults of the class that tokenizer.json does not hold are written out.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("backend", None) != "tokenizers" or "auto_map" in config:  # only version 5 writes `backend`
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer("a")["input_ids"]
    if extra := config.pop("extra_special_tokens", None):
        config["additional_special_tokens"] = extra  # 4.57 uses the other key for tokens with a name
    for name in ("model_specific_special_tokens", "is_local", "local_files_only"):  # the last two depend on where it was read
        config.pop(name, None)
    usual = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    if named := {name: token for name, token in config.items() if name.endswith("_token") and isinstance(token, str) and name not in usual}:
        config["extra_special_tokens"] = named
    config |= {name: getattr(tokenizer, name) for name in DEFAULTS}
    config |= {"add_bos_token": ids[:1] == [tokenizer.bos_token_id], "add_eos_token": ids[-1:] == [tokenizer.eos_token_id]}
    state = tokenizer.backend_tokenizer.pre_tokenizer and json.loads(tokenizer.backend_tokenizer.pre_tokenizer.__getstate__())
    if state and "add_prefix_space" in state:  # 4.57 applies this value, and false if there is none
        config["add_prefix_space"] = state["add_prefix_space"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
