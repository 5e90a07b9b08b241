"""The stage kind `grpo`: reinforcement learning of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.dataset import DatasetStage
from tuneline.kinds.engine import MAX_LORA_RANK
from tuneline.kinds.fields import Strict
from tuneline.kinds.rewards import FunctionReward, Reward, reward_problems
from tuneline.kinds.stage import Stage
from tuneline.kinds.training import Training

PROMPT = 512  # assumed prompt length in tokens, if the dataset stage sets no max_length
RL_RANK = 32


class Rollouts(Strict):
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that samples completions: `transformers`, the model in training itself; or `vllm`, a server in its own runtime that receives
    each new adapter."""


class GrpoStage(Training):
    """Train a LoRA adapter by reinforcement learning with verifiable rewards (GRPO, arXiv:2402.03300), with TRL and PEFT.

    The model answers each row's prompt, which is the row without its last answer. Rewards score the completions. One step samples
    global_batch_size completions, num_generations per prompt.
    """

    kind: Literal["grpo"]
    also_called: ClassVar = (*Training.also_called, "rl", "rlvr", "rft", "gspo", "dapo", "drgrpo")
    program: ClassVar = "tasks.training.grpo"
    imports: ClassVar = ("tasks.training.checkpoints", "tasks.training.grpo_trainer")
    libraries: ClassVar = (
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "math-verify",
        "reasoning-gym",
    )
    figures: ClassVar = ("reward_first", "reward")
    rewards: tuple[Reward, ...] = Field(min_length=1)
    """Reward functions; a completion's reward is their weighted sum."""
    learning_rate: float = Field(2e-5, gt=0, le=1)
    """Peak learning rate, reached after warm-up."""
    num_generations: int = Field(8, ge=2)
    """Number of completions sampled per prompt; they form a group, and rewards are compared within it."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Sampling temperature; higher values explore more."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens whose probabilities sum to this value."""
    top_k: int = Field(0, ge=0)
    """Sample from this many most likely tokens; 0 samples from all."""
    max_completion_length: int = Field(256, ge=1)
    """Maximum length of a completion, in tokens."""
    mask_truncated_completions: bool = False
    """Exclude completions truncated at max_completion_length from the loss (arXiv:2503.14476)."""
    beta: float = Field(0.0, ge=0)
    """Coefficient of the KL divergence from the model before training; 0 disables it."""
    epsilon: float = Field(0.2, gt=0)
    """Clipping range of the probability ratio."""
    epsilon_high: float | None = Field(None, gt=0)
    """Upper clipping range; by default `epsilon` (DAPO's clip-higher, arXiv:2503.14476: 0.28)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged: `grpo` per sequence, `dr_grpo` by max_completion_length (arXiv:2503.20783), `dapo` over the tokens
    of the whole batch."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Compute probability ratios per token, or per sequence (GSPO, arXiv:2507.18071)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards in the group or in the batch, or do not scale (arXiv:2503.20783)."""
    num_iterations: int = Field(1, ge=1)
    """Number of optimizer steps per batch of completions."""
    rollouts: Rollouts = Rollouts()
    """How completions are sampled."""

    def uses_engine(self) -> bool:
        return self.rollouts.engine == "vllm"

    def runs_user_code(self) -> bool:
        return any(isinstance(reward, FunctionReward) for reward in self.rewards)

    def longest_sequence(self, row: int | None) -> int:
        return (row or PROMPT) + self.max_completion_length

    def positions(self, row: int | None) -> tuple[str, int]:
        return "max_completion_length", (row or 1) + self.max_completion_length

    def scored_tokens(self, length: int) -> int:
        return self.max_completion_length

    def sampled_tokens(self) -> int:
        return 0 if self.uses_engine() else self.max_completion_length

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        yield from super().upstream_problems(stages)
        dataset = stages.get(self.dataset)
        if isinstance(dataset, DatasetStage) and dataset.repeats():
            found = f"found `{self.dataset}`, whose sources have repeat or weight, but grpo asks each prompt once per epoch"
            yield Problem("dataset", found, "use `max_rows` in its sources")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from reward_problems(self.rewards)
        if self.global_batch_size % self.num_generations:
            found = f"found {self.global_batch_size}, expected multiples of num_generations, {self.num_generations}"
            yield Problem("global_batch_size", found, "change one of them: a step samples whole groups of completions")
        if self.lora.lora_dropout:
            found = f"found {self.lora.lora_dropout}, expected 0 for grpo: with dropout the trained model differs from the one that samples"
            yield Problem("lora.lora_dropout", found, "remove it")
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            found = f"found {self.loss_type} with importance_sampling_level: sequence, expected grpo"
            yield Problem("loss_type", found, "set `loss_type: grpo`: the others weigh sequences by their length again (arXiv:2507.18071)")
        if self.resources.sequence_parallel_size > 1:
            # trl/trainer/grpo_trainer.py does not implement it.
            found = f"found {self.resources.sequence_parallel_size} for grpo, expected 1: TRL supports sequence parallelism only for sft"
            yield Problem("resources.sequence_parallel_size", found, "remove it")
        if self.resources.activation_offloading:
            # trl/trainer/grpo_config.py has no such field.
            yield Problem("resources.activation_offloading", "found activation_offloading for grpo, for which TRL has none", "remove it")
        if self.resources.strategy == "fsdp":
            # trl/models/utils.py, unwrap_model_for_generation, gathers the shards of ZeRO-3, but not those of FSDP2.
            yield Problem(
                "resources.strategy",
                "found fsdp for grpo, which needs unsharded weights for sampling",
                "set `strategy: zero3` or `strategy: zero2`",
            )
        if not self.uses_engine():
            return
        if self.resources.strategy == "zero3":
            # tasks/training/rollouts.py restores the previous step's unsharded weights to detect stale samples.
            yield Problem("resources.strategy", "found zero3 with rollouts by vLLM, expected ddp, zero1 or zero2", "set `strategy: zero2`")
        if self.resources.nodes > 1:
            yield Problem(
                "resources.nodes", f"found {self.resources.nodes} with rollouts by vLLM, expected 1: the vLLM server runs on one machine"
            )
        # Limits of vLLM's LoRA kernels: vllm/lora/peft_helper.py (DoRA), vllm/config/lora.py (ranks).
        if self.lora.use_dora:
            yield Problem("lora.use_dora", "found DoRA, which vLLM does not serve", "remove it, or set `rollouts: {engine: transformers}`")
        if (highest := self.lora.highest_rank()) > MAX_LORA_RANK:
            found = f"found {highest}, expected at most {MAX_LORA_RANK}, the highest rank that vLLM serves"
            yield Problem(
                "lora.r" if highest == self.lora.r else "lora.rank_pattern", found, "lower it, or set `rollouts: {engine: transformers}`"
            )
        engine = self.resources.engine
        if engine is not None:
            yield from engine.copies_problems(engine.gpus)
        if engine is not None and engine.gpus and engine.gpus == self.resources.gpus:
            found = f"found {engine.gpus}, expected fewer than resources.gpus, {self.resources.gpus}"
            yield Problem("resources.engine.gpus", found, "leave a GPU for the training, or set `gpus: 0` to share the first one")

    def warnings(self) -> Iterator[Problem]:
        yield from super().warnings()
        if self.lora.r < RL_RANK and self.adapter is None:  # an earlier adapter's rank is what it is
            # verl's guide: smaller ranks converge more slowly and end lower; 32 came close to full training at 0.5B, 128 at 32B.
            message = f"{self.lora.r} may learn slowly: verl's guide advises {RL_RANK} or more for reinforcement learning"
            yield Problem("lora.r", message, f"set `lora: {{r: {RL_RANK}, lora_alpha: {2 * RL_RANK}}}`")
