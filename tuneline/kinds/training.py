"""Stages that train: what they share, supervised fine-tuning of an adapter or of all weights, and reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from tuneline.kinds.engine import MAX_LORA_RANK
from tuneline.kinds.fields import AdapterRef, ArtifactType, DatasetRef, Finding, ModelRef, OnUnrendered, Strict
from tuneline.kinds.rewards import Reward
from tuneline.kinds.rewards import findings as reward_findings
from tuneline.kinds.stage import ComputingStage
from tuneline.kinds.strategy import findings as strategy_findings


class Lora(Strict):
    """Low-rank adapters, in PEFT's words."""

    r: int = Field(16, ge=1, le=1024)
    """Rank: more can learn more, and takes more memory."""
    lora_alpha: float = Field(32, gt=0)
    """Strength: the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of adapter inputs dropped while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Layers that get an adapter: names of linear layers and of experts' tensors, or all of them but the head."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353): often better, slower."""

    def unserved(self) -> str | None:
        """What of it vLLM's kernels do not know: vllm/lora/peft_helper.py (DoRA), vllm/config/lora.py (ranks)."""
        if self.use_dora:
            return "DoRA, which vLLM does not serve"
        return f"rank {self.r}, where vLLM serves at most {MAX_LORA_RANK}" if self.r > MAX_LORA_RANK else None


class EarlyStopping(Strict):
    patience: int = Field(3, ge=1)
    """Evaluations without a better validation loss after which training ends; the best adapter is kept."""
    threshold: float = Field(0.0, ge=0)
    """Least improvement that counts."""


class Training(ComputingStage):
    """What every training has."""

    model: ModelRef
    """Model to begin with."""
    dataset: DatasetRef
    """Rows to train on: its train split."""
    adapter: AdapterRef | None = None
    """Adapter of the same base to go on from."""
    lora: Lora = Lora()
    """Shape of the adapter."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Highest step size, reached after the warm-up."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: float = Field(0, ge=0)
    """Steps of warm-up; below 1, a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Pull of the weights towards zero (AdamW's)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data, unless max_steps is given."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(16, ge=1)
    """Sequences per optimizer step over all devices."""
    no_end: bool = False
    """Trains under a chat template that writes no token after an answer, too: the model then never learns where to stop."""
    on_unrendered: OnUnrendered = "error"
    """What happens to a row of which the chat template leaves something out, as calls or a system prompt: it is refused, left out, or
    trained on as it is rendered."""

    def gives(self) -> ArtifactType:
        return "Adapter"

    def micro_batch_size(self) -> int:
        """Rows one device takes at once: as given, or the largest divisor of its share that is at most 8."""
        return self.resources.micro_batch_size or self._divisor_up_to(8)

    def _divisor_up_to(self, most: int) -> int:
        share = max(1, self.global_batch_size // self.resources.data_parallel_size)
        return max(n for n in range(1, min(most, share) + 1) if share % n == 0)

    def smaller_micro_batch(self, size: int) -> int | None:
        share = self.global_batch_size // self.resources.data_parallel_size
        return max((n for n in range(1, size // 2 + 1) if share % n == 0), default=None)

    def findings(self) -> Iterator[Finding]:
        yield from strategy_findings(self.resources, self.lora.use_dora)
        at_once, shared, micro = self.resources.data_parallel_size, self.resources.sequence_parallel_size, self.micro_batch_size()
        if self.global_batch_size % (micro * at_once):
            alone = self.global_batch_size % at_once  # no micro-batch would do
            of = f"{at_once} {'process' if at_once == 1 else 'processes'}" if shared == 1 else f"{at_once} groups of {shared} processes"
            yield Finding(
                "global_batch_size",
                f"found {self.global_batch_size}, allowed multiples of {micro * at_once} (micro_batch_size {micro} x {of})",
                "change the number of processes, or the batch"
                if alone
                else "change resources.micro_batch_size: it does not change the result",
            )
        if {"checkpoint_steps", "checkpoint_minutes"} <= self.resources.model_fields_set:
            found = "found checkpoint_steps with checkpoint_minutes, which take their place"
            yield Finding("resources.checkpoint_steps", found, "leave one of them out")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            yield Finding(
                "lr_scheduler_type",
                "found constant with warmup_steps, which it ignores",
                "set `lr_scheduler_type: constant_with_warmup`",
            )


class SftStage(Training):
    """Supervised fine-tuning of a LoRA adapter, or of all weights, by TRL and PEFT. The dataset's validation split is watched.

    global_batch_size counts packed sequences when packing.
    """

    kind: Literal["sft"]
    method: Literal["lora", "qlora", "full"] = "lora"
    """What is trained: an adapter (`lora`), an adapter on a base that bitsandbytes holds in few bits meanwhile (`qlora`,
    arXiv:2305.14314), or every weight (`full`), which gives a Model."""
    bits: Literal[4, 8] = 4
    """Bits of the base's weights with qlora: 4 (NF4, its scales quantized too), or 8 (LLM.int8(), arXiv:2208.07339)."""
    train_on: Literal["completion", "assistant", "all"] = "assistant"
    """Tokens that count in the loss: the last answer, every assistant turn, or everything. Plain text: always all."""
    max_length: int = Field(1024, ge=8)
    """Tokens a sequence may have, and the length of a packed one. A longer row is an error: cut it in the dataset stage."""
    packing: bool = False
    """Fills sequences with several rows: fewer, fuller steps."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between losses on the validation split."""
    early_stopping: EarlyStopping | None = None
    """Ends training when the validation loss no longer falls."""

    def gives(self) -> ArtifactType:
        return "Model" if self.method == "full" else "Adapter"

    def micro_batch_size(self) -> int:
        """One where packing: packed sequences are full already, and are joined into one, where attention costs the square."""
        return self.resources.micro_batch_size or self._divisor_up_to(1 if self.packing else 8)

    def findings(self) -> Iterator[Finding]:
        yield from super().findings()
        if self.early_stopping and self.eval_steps is None:
            yield Finding("early_stopping", "found early_stopping without eval_steps", "set `eval_steps: 20`, say")
        if self.early_stopping and "checkpoint_steps" in self.resources.model_fields_set:
            found = "found checkpoint_steps with early_stopping, which saves at each evaluation"
            hint = "leave it out; `checkpoint_minutes` saves in between as well"
            yield Finding("resources.checkpoint_steps", found, hint)
        if self.method == "full":
            found = "with `method: full`, which trains the model's own weights"
            if "lora" in self.model_fields_set:
                yield Finding("lora", f"found lora {found}", "leave it out, or set `method: lora`")
            if self.adapter is not None:
                yield Finding("adapter", f"found an adapter {found}", "merge it, and name the merged model under `model:`")
        if self.method != "qlora" and "bits" in self.model_fields_set:
            found = f"found bits with `method: {self.method}`, which quantizes nothing"
            yield Finding("bits", found, "set `method: qlora`, or leave it out")
        # PEFT's dequantize_module_weight, which DoRA needs, loses the scales of 8-bit weights on a CPU (0.21.2, utils/integrations.py).
        if self.method == "qlora" and self.bits == 8 and self.lora.use_dora:
            yield Finding("lora.use_dora", "found DoRA with `method: qlora` and 8 bits, allowed with 4", "leave out use_dora, or bits")
        # docs/source/fsdp_qlora.md of bitsandbytes, docs/source/accelerate/deepspeed.md of PEFT: weights of 4 bits are split only where
        # they are stored as floating-point numbers (bnb_4bit_quant_storage), which is not tried here; those of 8 bits never.
        if self.method == "qlora" and self.resources.strategy in ("zero3", "fsdp"):
            found = f"found {self.resources.strategy} with `method: qlora`, allowed ddp, zero1, zero2, device_map"
            yield Finding("resources.strategy", found, "bitsandbytes' weights are not split over devices; they take little memory on each")
        # deepspeed/runtime/sequence_parallel/ulysses_sp.py, uattn_wrapper: it drops the mask that keeps packed rows apart.
        if self.packing and self.resources.sequence_parallel_size > 1:
            found = f"found {self.resources.sequence_parallel_size} with packing, where packed rows would see one another"
            yield Finding("resources.sequence_parallel_size", found, "set `packing: false`, or leave it out")

    def warnings(self) -> Iterator[Finding]:
        if self.method == "full" and "learning_rate" not in self.model_fields_set:
            message = f"{self.learning_rate:g}, the default, suits adapters and wrecks a model that is trained whole"
            yield Finding("learning_rate", message, "set `learning_rate: 1e-5`, say")


class Rollouts(Strict):
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples completions: the model that is trained, or vLLM, a server in a runtime of its own that gets each new adapter."""


class GrpoStage(Training):
    """Reinforcement learning of a LoRA adapter with verifiable rewards (GRPO, arXiv:2402.03300), by TRL and PEFT.

    The dataset's rows are asked for their last answer; what is right is told by rewards. One step samples global_batch_size
    completions, num_generations for each prompt.
    """

    kind: Literal["grpo"]
    rewards: tuple[Reward, ...] = Field(min_length=1)
    """What a good completion is: their weighted sum."""
    learning_rate: float = Field(2e-5, gt=0, le=1)
    """Highest step size, reached after the warm-up."""
    num_generations: int = Field(8, ge=2)
    """Completions sampled for each prompt; their rewards are compared with one another."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Of sampling: higher explores more."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sampling is from the likeliest tokens that have this share of the probability."""
    max_completion_length: int = Field(256, ge=1)
    """Longest completion, in tokens."""
    mask_truncated_completions: bool = False
    """Leaves completions that reached the longest length out of the loss (arXiv:2503.14476)."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the model that the training began with; 0 leaves it out."""
    epsilon: float = Field(0.2, gt=0)
    """Clipping of the probability ratio."""
    epsilon_high: float | None = Field(None, gt=0)
    """Clipping above, where it is another one (DAPO's clip-higher, arXiv:2503.14476: 0.28)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged: `grpo` by sequence, `dr_grpo` by the longest length (arXiv:2503.20783), `dapo` by the tokens of
    the whole batch."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Probability ratios of tokens, or of whole sequences (GSPO, arXiv:2507.18071)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the standard deviation of rewards in the group, in the batch, or not at all (arXiv:2503.20783)."""
    num_iterations: int = Field(1, ge=1)
    """Optimizer steps on each batch of completions."""
    rollouts: Rollouts = Rollouts()
    """What samples completions."""

    def uses_engine(self) -> bool:
        return self.rollouts.engine == "vllm"

    def findings(self) -> Iterator[Finding]:
        yield from super().findings()
        yield from reward_findings(self.rewards)
        if self.global_batch_size % self.num_generations:
            found = f"found {self.global_batch_size}, allowed multiples of num_generations, {self.num_generations}"
            yield Finding("global_batch_size", found, "a step samples whole groups of completions for the same prompt")
        if self.lora.lora_dropout:
            found = f"found {self.lora.lora_dropout}, allowed 0: completions would be sampled from another model than is trained"
            yield Finding("lora.lora_dropout", found, "leave it out")
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            found = f"found {self.loss_type} with importance_sampling_level: sequence, allowed grpo"
            yield Finding("loss_type", found, "any other weighs a sequence by its length again (arXiv:2507.18071)")
        if self.resources.sequence_parallel_size > 1:
            # trl/trainer/grpo_trainer.py has no part for it.
            found = f"found {self.resources.sequence_parallel_size} for grpo, allowed 1: TRL shares sequences in sft alone"
            yield Finding("resources.sequence_parallel_size", found, "leave it out")
        if self.resources.strategy == "fsdp":
            # trl/models/utils.py, unwrap_model_for_generation: it gathers what ZeRO-3 has split, and knows nothing of FSDP2.
            yield Finding("resources.strategy", "found fsdp for grpo, which samples from whole weights", "use zero3, or zero2")
        if not self.uses_engine():
            return
        if self.resources.strategy == "zero3":
            # tasks/training/rollouts.py puts the weights of the step before in place, whole, to tell fresh from stale.
            yield Finding("resources.strategy", "found zero3 with rollouts of vLLM, allowed ddp, zero1, zero2", "use zero2")
        if self.resources.nodes > 1:
            yield Finding("resources.nodes", f"found {self.resources.nodes} with rollouts of vLLM, whose server is for one machine")
        # vLLM's LoRA kernels: vllm/lora/peft_helper.py (DoRA), vllm/config/lora.py (ranks).
        if self.lora.use_dora:
            yield Finding(
                "lora.use_dora", "found DoRA, which vLLM does not serve", "set `rollouts: {engine: transformers}`, or leave it out"
            )
        if self.lora.r > MAX_LORA_RANK:
            found = f"found {self.lora.r}, allowed at most {MAX_LORA_RANK}, the highest rank that vLLM serves"
            yield Finding("lora.r", found, "lower it, or sample with transformers")
        engine = self.resources.engine
        if engine is not None and engine.gpus and engine.gpus == self.resources.gpus:
            found = f"found {engine.gpus}, allowed fewer than resources.gpus, {self.resources.gpus}"
            yield Finding("resources.engine.gpus", found, "the training needs a GPU too; with `gpus: 0` they share the first")
