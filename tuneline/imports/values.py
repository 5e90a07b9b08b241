"""Conversions of values: what tools write, to what pipelines.yaml has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tuneline.config.yaml_source import yaml_value
from tuneline.imports.fates import Refused, Without

ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam", "AdamW")
OPTIMIZERS = {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit", "lion_32bit": "lion"}
IS_OFF = "it is off, as here"
FLOAT16 = "tuneline computes in bfloat16 or float32, never in float16: `dtype: auto` is bfloat16 on GPUs"


def plain(text: str) -> Any:
    """Return the value of a word of a command line: a number, true or false, JSON, or the text."""
    if text[:1] in "[{" and text[-1:] in "]}":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return yaml_value(text)


def number(value: Any) -> Any:
    """Return a number, also one that is written as text (`1e-4` in quotes). Raises ValueError for other text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def whole(value: Any) -> int:
    """Return a whole number. Raises ValueError for others."""
    found = number(value)
    if found != int(found):
        raise ValueError
    return int(found)


def top_k(value: Any) -> int:
    """Return how many tokens are candidates. Tools write -1 or 0 for all, here it is 0."""
    return max(0, whole(value))


def true(value: Any) -> bool:
    """Return true or false, also as text. Raises ValueError for other values."""
    known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    return known[str(value).lower()] if str(value).lower() in known else _fail()


def _fail() -> bool:
    raise ValueError


def names(value: Any) -> list[str]:
    """Return a list of names, from a list or from text with commas or spaces."""
    items = value if isinstance(value, list) else re.split(r"[\s,]+", str(value).strip("[] "))
    return [str(item).strip("'\" ") for item in items if str(item).strip("'\" ")]


def modules(value: Any) -> Any:
    """Return `target_modules`: `all-linear`, a list of names, or a regular expression as it is."""
    if isinstance(value, str) and re.search(r"[*\\|()^$]", value):
        return value
    found = names(value)
    if found in (["all"], ["all-linear"], ["linear"]):
        return "all-linear"
    return found or Refused("write `lora: {target_modules: [q_proj, v_proj]}`")


def above(least: float) -> Callable[[Any], Any]:
    """Return a conversion that drops values up to `least`, such as -1 for `no limit`."""
    return lambda value: whole(value) if number(value) > least else Without("the value stands for no limit")


def warmup(value: Any) -> Any:
    found = number(value)
    return found if found > 0 else Without("no warm-up is the default")


def optimizer(value: Any) -> Any:
    if value in ADAMW:
        return Without("AdamW is what trains here")
    return OPTIMIZERS.get(str(value), value)


def dtype(value: Any) -> Any:
    name = str(value).removeprefix("torch.").lower()
    if name in ("bfloat16", "bf16"):
        return "bfloat16"
    if name in ("float32", "fp32"):
        return "float32"
    return Without("`dtype: auto` is bfloat16 on GPUs, else float32") if name in ("auto", "none") else Refused(FLOAT16)


def brain_float(value: Any) -> Any:
    return "bfloat16" if value == "auto" or true(value) else Without("it is off; `dtype: auto` is bfloat16 on GPUs")


def half(value: Any) -> Any:
    return Refused(FLOAT16) if value == "auto" or true(value) else Without(IS_OFF)


def attention(value: Any) -> Any:
    found = {"auto": "auto", "disabled": "eager", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
    found |= {"flash_attn": "flash_attention_2", "flash_attention_2": "flash_attention_2", "flash_attention_3": "flash_attention_3"}
    found |= {name: name for name in ("sdpa", "eager", "flex_attention")} | {
        "flash_attention": "flash_attention_2",
        "flash_attn_3": "flash_attention_3",
    }
    name = found.get(str(value))
    return name if name else Refused("write `attn_implementation: sdpa` or another of ours under `resources:`")


def if_on(written: Any) -> Callable[[Any], Any]:
    """Return a conversion of a switch: `written` if it is on."""
    return lambda value: written if true(value) else Without(IS_OFF)


kernels = if_on("liger")


def size(value: Any) -> Any:
    """Return a shard size with its unit; a plain number is in GB."""
    return f"{number(value):g}GB" if not isinstance(value, str) or re.fullmatch(r"[\d.]+", value) else value.replace("GiB", "GB")


def trackers(value: Any) -> Any:
    found = [name for name in names(value) if name not in ("none", "None", "all", "console")]
    return {name: {} for name in found} if found else Without("no tracker is the default")
