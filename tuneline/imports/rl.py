"""What the reinforcement learning of several tools shares: rewards by name, and the engine that samples."""

from __future__ import annotations

import math
from typing import Any

from tuneline.imports.fates import Without
from tuneline.imports.translation import Translation
from tuneline.imports.values import names, number

MATH = {"type": "math_equal"}
THINK = r"<think>.*?</think>\s*<answer>.*?</answer>"
REWARDS: dict[str, dict[str, Any]] = {  # names of rewards in other tools
    **dict.fromkeys(("accuracy", "math", "accuracy_reward", "math_rule", "MathRuleRewardWorker", "crossthinkqa"), MATH),
    "format": {"type": "format", "pattern": THINK},
    "think_format_reward": {"type": "format", "pattern": r"<think>.*?</think>.*"},
    "code_sandbox": {"type": "python_tests"},
    "CodeSandboxRewardWorker": {"type": "python_tests"},
}
OWN = "write a function for it: `{file: rewards.py, function: NAME}` in `rewards:` (docs/rewards.md)"
SIGNATURE = "it takes prompts, completions and the columns of the rows, and returns one number per completion (docs/rewards.md)"


def write_rewards(translation: Translation, key: str, weights: Any, file: Any = None) -> None:
    """Write `rewards:` for the names under `key`. `file`: one with functions of your own."""
    found: list[dict[str, Any]] = []
    given = weights if isinstance(weights, list) else []
    for i, name in enumerate(names(translation.value(key, default=[]))):
        reward = REWARDS.get(name)
        if reward is None and isinstance(file, str) and file:
            reward = {"file": translation.local(file), "function": name.rpartition(".")[2]}
            translation.remarks.append(f"the reward `{name}` must be a function: {SIGNATURE}")
        if reward is None:
            translation.remarks.append(f"the reward `{name}` has no counterpart: {OWN}")
            continue
        weight = number(given[i]) if i < len(given) and isinstance(given[i], int | float) else 1
        if reward not in [{key: value for key, value in other.items() if key != "weight"} for other in found]:
            found.append(reward | ({"weight": weight} if weight != 1 else {}))
    if not found:
        hint = f"name one of them in the source, or import and {OWN}"
        known = ", ".join(sorted(name for name in REWARDS if name.islower()))
        raise translation.job.wrong(key, f"found no reward that has a counterpart, expected one of {known}", hint)
    translation.write("train.rewards", found, key=key)


def write_engine(translation: Translation, memory: str, length: str) -> None:
    """Write `rollouts: {engine: vllm}` and vLLM's settings."""
    translation.write("train.rollouts.engine", "vllm")
    for key, path in ((memory, "gpu_memory_utilization"), (length, "max_model_len")):
        value = translation.value(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            translation.write(f"train.resources.engine.{path}", value, key=key)


def whole_groups(translation: Translation) -> None:
    """Round the completions per step up to whole groups."""
    train = translation.parts["train"]
    size, group = train.get("global_batch_size"), train.get("num_generations")
    if isinstance(size, int) and isinstance(group, int) and group > 1 and size % group:
        translation.write("train.global_batch_size", math.lcm(size, group), f"{size} in the source; a step samples whole groups")


def fit_to_engine(translation: Translation) -> None:
    """Replace a strategy that does not run with rollouts by vLLM."""
    resources = translation.parts["train"].get("resources", {})
    if not translation.lacks("train.rollouts.engine") and resources.get("strategy") in ("zero3", "fsdp"):
        translation.write("train.resources.strategy", "zero2", f"in place of {resources['strategy']}, which vLLM's rollouts do not support")
        if "offload" in resources:
            resources["offload"] = "optimizer"


SEPARATE = Without("tuneline starts vLLM itself, on the GPUs of `resources: {engine: {gpus: N}}` or the first one")
