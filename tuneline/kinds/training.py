"""Fields and rules that every kind of training shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.engine import MAX_LORA_RANK
from tuneline.kinds.fields import AdapterRef, ArtifactType, DatasetRef, FullPrecisionRef, OnUnrendered, Strict
from tuneline.kinds.stage import ComputingStage, Stage
from tuneline.kinds.strategy import strategy_problems

Method = Literal["lora", "qlora", "full"]


class Lora(Strict):
    """Low-rank adapter (LoRA), under PEFT's names."""

    r: int = Field(16, ge=1, le=1024)
    """Rank; a higher rank has more capacity and needs more memory."""
    lora_alpha: float = Field(32, gt=0)
    """Scaling numerator: the update is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapter's inputs during training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter: names of linear layers and expert tensors, or `all-linear` for all of them except the output head."""
    use_rslora: bool = False
    """Use rank-stabilized scaling (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Use weight-decomposed adapters (DoRA, arXiv:2402.09353): often more accurate, but slower."""

    def unserved(self) -> str | None:
        """Return what vLLM cannot serve, or None: vllm/lora/peft_helper.py (DoRA), vllm/config/lora.py (ranks)."""
        if self.use_dora:
            return "DoRA, which vLLM does not serve"
        return f"rank {self.r}, but vLLM serves at most {MAX_LORA_RANK}" if self.r > MAX_LORA_RANK else None


class Training(ComputingStage):
    """Fields of every training, and methods that estimates use."""

    trains: ClassVar = True
    batches: ClassVar = True
    role: ClassVar = "fine-tuned"  # tables call an adapter `adapter`
    also_called: ClassVar[tuple[str, ...]] = ("train", "training", "finetune", "finetuning", "tune", "lora", "adapter")
    model: FullPrecisionRef
    """Model to train."""
    dataset: DatasetRef
    """Dataset whose train split is trained on."""
    adapter: AdapterRef | None = None
    """Adapter of the same base model to continue training."""
    lora: Lora = Lora()
    """Settings of the adapter."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate, reached after warm-up."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Learning rate schedule after warm-up."""
    warmup_steps: float = Field(0, ge=0)
    """Number of warm-up steps; a value below 1 is a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum gradient norm; larger gradients are clipped to it."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Number of passes over the train split; ignored if max_steps is set."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; overrides num_train_epochs."""
    global_batch_size: int = Field(16, ge=1)
    """Number of sequences per optimizer step, over all devices."""
    no_end: bool = False
    """Train even if the chat template writes no token after an answer; the model then never learns where to stop."""
    on_unrendered: OnUnrendered = "error"
    """How to handle rows of which the chat template omits a part, such as tool calls or a system prompt: `error` fails the stage, `drop`
    drops the row, `keep` trains on the row as rendered."""

    def output_type(self) -> ArtifactType:
        return "Adapter"

    def made_from(self) -> str | None:
        return self.model

    @abstractmethod
    def longest_sequence(self, row: int | None) -> int:
        """Return the maximum length of a sequence in tokens, including padding. `row`: max_length of the dataset stage."""

    @abstractmethod
    def positions(self, row: int | None) -> tuple[str, int]:
        """Return the field that limits a sequence's positions, and that limit."""

    def training_method(self) -> Method:
        return "lora"

    def base_bits(self) -> int:
        """Return the bits per base weight under QLoRA."""
        return 4

    def packs(self) -> bool:
        """Return whether sequences hold several rows."""
        return False

    def shares_sequences(self) -> bool:
        """Return whether the stage supports `sequence_parallel_size` above 1."""
        return False

    def sequences_per_row(self) -> int:
        """Return the number of sequences of a row whose activations are kept for the backward pass."""
        return 1

    def copies_base(self) -> bool:
        """Return whether the training keeps a second, frozen copy of the base, as the reference."""
        return False

    def scored_tokens(self, length: int) -> int:
        """Return the number of tokens of a sequence of `length` for which logits are computed."""
        return length

    def sampled_tokens(self) -> int:
        """Return the maximum number of tokens that the trained model itself samples for a sequence; 0 if it samples none."""
        return 0

    def packages(self) -> frozenset[str]:
        return super().packages() | ({"bitsandbytes"} if self.training_method() == "qlora" else frozenset())

    def unserved(self, by: ComputingStage) -> str | None:
        return self.lora.unserved() if self.output_type() == "Adapter" else None

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        other = stages.get(self.adapter or "")
        if isinstance(other, Training) and other.model != self.model:
            yield Problem("adapter", f"found `{self.adapter}`, trained on `{other.model}`, expected an adapter of `{self.model}`")

    def micro_batch_size(self) -> int:
        """Return the per-device batch size: as set, or the largest divisor of the device's share that is at most 8."""
        return self.resources.micro_batch_size or self._divisor_up_to(8)

    def _divisor_up_to(self, most: int) -> int:
        share = max(1, self.global_batch_size // self.resources.data_parallel_size)
        return max(n for n in range(1, min(most, share) + 1) if share % n == 0)

    def smaller_micro_batch(self, size: int) -> int | None:
        share = self.global_batch_size // self.resources.data_parallel_size
        return max((n for n in range(1, size // 2 + 1) if share % n == 0), default=None)

    def problems(self) -> Iterator[Problem]:
        yield from strategy_problems(self.resources, self.lora.use_dora)
        at_once, shared, micro = self.resources.data_parallel_size, self.resources.sequence_parallel_size, self.micro_batch_size()
        if self.global_batch_size % (micro * at_once):
            alone = self.global_batch_size % at_once  # no micro-batch size would fit
            of = f"{at_once} {'process' if at_once == 1 else 'processes'}" if shared == 1 else f"{at_once} groups of {shared} processes"
            yield Problem(
                "global_batch_size",
                f"found {self.global_batch_size}, expected multiples of {micro * at_once} (micro_batch_size {micro} x {of})",
                "change global_batch_size or the number of processes"
                if alone
                else "change resources.micro_batch_size: it does not change the result",
            )
        if {"checkpoint_steps", "checkpoint_minutes"} <= self.resources.model_fields_set:
            found = "found checkpoint_steps with checkpoint_minutes, which replaces it"
            yield Problem("resources.checkpoint_steps", found, "remove one of them")
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            yield Problem(
                "lr_scheduler_type",
                "found constant with warmup_steps, which it ignores",
                "set `lr_scheduler_type: constant_with_warmup`",
            )
