"""Fields and rules that every kind of training shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.adapters import Lora, Places
from tuneline.kinds.fields import AdapterRef, ArtifactType, DatasetRef, FullPrecisionRef, OnUnrendered
from tuneline.kinds.optimization import BITSANDBYTES, Optimizer, optimization_problems, scaling_advice
from tuneline.kinds.speed import speed_problems
from tuneline.kinds.stage import ComputingStage, Stage
from tuneline.kinds.strategy import strategy_problems

Method = Literal["lora", "qlora", "full"]
BITSANDBYTES_LIBRARIES = ("bitsandbytes",)


class Training(ComputingStage):
    """Fields of every training, and methods that estimates use."""

    trains: ClassVar = True
    parallel: ClassVar = True
    batches: ClassVar = True
    role: ClassVar = "fine-tuned"  # tables call an adapter `adapter`
    also_called: ClassVar[tuple[str, ...]] = ("train", "training", "finetune", "finetuning", "tune", "lora", "adapter")
    every_adapter: ClassVar[bool] = False
    """Whether the program also trains adapters that are not LoRA, and modules as a whole."""
    may_change_base: ClassVar[bool] = False
    """Whether first weights of LoRA may be computed from the base's weights, which are then changed, or from rows."""
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
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup",
        "cosine_with_min_lr", "warmup_stable_decay", "polynomial", "inverse_sqrt",
    ] = "linear"  # fmt: skip
    """Learning rate schedule after warm-up, under transformers' names."""
    warmup_steps: float = Field(0, ge=0)
    """Number of warm-up steps; a value below 1 is a share of all steps."""
    min_lr_ratio: float = Field(0.0, ge=0, lt=1)
    """Final learning rate of `cosine_with_min_lr`, `warmup_stable_decay` and `polynomial`, as a share of learning_rate."""
    lr_decay_steps: float = Field(0.1, gt=0)
    """Number of last steps in which `warmup_stable_decay` lowers the learning rate; a value below 1 is a share of all steps."""
    lr_power: float = Field(1.0, gt=0)
    """Power of `polynomial`; 1 is linear."""
    optim: Optimizer = "adamw"
    """Optimizer: `adamw`, torch's; `adamw_8bit` with states in 8 bits, `paged_adamw_8bit` and `paged_adamw_32bit`, which move states to CPU
    memory when the GPU's is short (arXiv:2110.02861); `adafactor` with row and column means instead of states (arXiv:1804.04235); `lion`,
    for a 3 to 10 times lower learning_rate (arXiv:2302.06675); `muon`, which orthogonalizes the updates of matrices, for AdamW's learning
    rates, and trains embeddings, heads and vectors by AdamW (arXiv:2502.16982)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradients' mean in AdamW, and of the update in Lion."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the squared gradients' mean in AdamW, and of the momentum in Lion, whose paper uses 0.99."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Epsilon of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, decoupled from the gradient as in AdamW."""
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
        return super().packages() | ({"bitsandbytes"} if self.uses_bitsandbytes() else frozenset())

    def uses_bitsandbytes(self) -> bool:
        """Return whether bitsandbytes quantizes the base or is the optimizer."""
        return self.training_method() == "qlora" or self.optim in BITSANDBYTES

    def libraries_in_key(self) -> tuple[str, ...]:
        return (*self.libraries, *(BITSANDBYTES_LIBRARIES if self.uses_bitsandbytes() else ()))

    def unserved(self, by: ComputingStage) -> str | None:
        if self.output_type() != "Adapter":
            return None
        return "new tokens, which vLLM does not serve" if self.added_tokens() else self.adapter_settings().unserved()

    def adapter_settings(self) -> Places:
        """Return the settings of the adapter, of whichever kind it is."""
        return self.lora

    def added_tokens(self) -> tuple[str, ...]:
        return ()

    def upstream_problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        other = stages.get(self.adapter or "")
        if isinstance(other, Training) and (theirs := other.adapter_settings().kind) != (ours := self.adapter_settings().kind):
            yield Problem(
                "adapter", f"found `{self.adapter}`, which trains `{theirs}`, expected `{ours}`", f"configure `{theirs}` here too"
            )
        if isinstance(other, Training) and other.added_tokens() != self.added_tokens():
            found = f"found `{self.adapter}`, which adds the tokens {', '.join(other.added_tokens()) or 'none'}"
            yield Problem(
                "adapter", f"{found}, expected the same as this stage", "write the same `add_tokens` in both, or merge the adapter first"
            )
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

    def keeps_best(self) -> bool:
        """Return whether the best evaluation's weights are kept, so that every evaluation writes a checkpoint."""
        return False

    def full_logits(self) -> bool:
        """Return whether the loss needs the logits of all tokens and words at once, which TRL otherwise avoids."""
        return False

    def warnings(self) -> Iterator[Problem]:
        yield from scaling_advice(self)

    def problems(self) -> Iterator[Problem]:
        settings = self.adapter_settings()
        yield from strategy_problems(self.resources, self.lora.use_dora)
        yield from optimization_problems(self)
        yield from speed_problems(self)
        yield from (replace(problem, field=f"{settings.kind}.{problem.field}") for problem in settings.problems())
        yield from self._init_problems()
        yield from self._whole_problems()
        if self.lora.lora_plus_ratio != 1 and not self.every_adapter:
            yield Problem("lora.lora_plus_ratio", f"found {self.lora.lora_plus_ratio:g} for {self.kind}, expected 1", "remove it")
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

    def _init_problems(self) -> Iterator[Problem]:
        """Yield problems of LoRA's first weights with other fields."""
        init, field = self.lora.init_lora_weights, "lora.init_lora_weights"
        if init is True:
            return
        if self.adapter is not None:
            yield Problem(field, f"found {init} with `adapter`, whose weights are trained further", "remove it")
        if init == "gaussian":
            return
        if not self.may_change_base:
            # The reference model and the sampled one are the base with its adapter off or on: a changed base would be neither.
            yield Problem(field, f"found {init}, expected true or gaussian for {self.kind}", "remove it, or train with sft first")
        if self.lora.changes_base() and self.training_method() == "qlora":
            # peft/tuners/lora/layer.py: pissa_init needs floating-point weights; olora_init quantizes again, so no adapter fits the base.
            yield Problem(field, f"found {init} with `method: qlora`, which cannot subtract from quantized weights", "set `method: lora`")
        if init == "loftq" and (self.training_method() != "qlora" or self.base_bits() != 4):
            found, hint = f"`method: {self.training_method()}`, expected `method: qlora`", "set `method: qlora`"
            if self.training_method() == "qlora":
                found, hint = f"`bits: {self.base_bits()}`, expected 4 bits", "remove `bits`"
            yield Problem(field, f"found loftq with {found}", f"{hint}: LoftQ starts from what a base in 4 bits has lost")
        if self.resources.strategy in ("zero3", "fsdp") or (init == "eva" and self.resources.strategy == "device_map"):
            # peft/tuners/lora/eva.py and layer.py compute on one process's whole model, before it is sharded.
            found = f"found {self.resources.strategy} with lora.init_lora_weights: {init}, which needs the whole model in one place"
            yield Problem("resources.strategy", found, "set `strategy: zero2`")

    def _whole_problems(self) -> Iterator[Problem]:
        """Yield problems of modules and tokens that are trained whole."""
        settings = self.adapter_settings()
        fields = [(f"{settings.kind}.modules_to_save", settings.modules_to_save), ("add_tokens", self.added_tokens())]
        for field in (name for name, given in fields if given):
            if not self.every_adapter:
                yield Problem(
                    field, f"found {field.rpartition('.')[2]} for {self.kind}, which hands over only LoRA's matrices", "remove it"
                )
            elif self.resources.strategy in ("zero3", "fsdp"):
                # peft/utils/other.py: TrainableTokensWrapper.update "does not support deepspeed/fsdp"; a module's copy is made before
                # FSDP shards the original.
                found = f"found {self.resources.strategy} with {field}, which PEFT copies from unsharded weights"
                yield Problem("resources.strategy", found, "set `strategy: zero2`")
