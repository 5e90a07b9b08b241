"""The stage kind `sft`: supervised fine-tuning of an adapter or of all weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.adapters import Places
from tuneline.kinds.fields import ArtifactType, Strict
from tuneline.kinds.other_adapters import AdaLora, Ia3, Oft, Vera
from tuneline.kinds.training import Method, Training

OTHER_ADAPTERS = ("adalora", "vera", "oft", "ia3")
LOW_FOR_ADAPTERS = 2e-5  # a fifth of the lowest that guides use for LoRA


class LastAnswers(Strict):
    last: int = Field(ge=2)
    """Number of answers at the end of a conversation that count in the loss; `completion` trains only the last one."""


class EarlyStopping(Strict):
    patience: int = Field(3, ge=1)
    """Stop after this many evaluations without a better validation loss; the best adapter is kept."""
    threshold: float = Field(0.0, ge=0)
    """Minimum decrease of the validation loss that counts as an improvement."""


class AnswerTraining(Training):
    """Fields and rules of a training on answers of a dataset: one to a prompt, or several that are compared."""

    libraries: ClassVar = ("torch", "transformers", "tokenizers", "safetensors", "trl", "peft", "accelerate", "datasets")
    figures: ClassVar[tuple[str, ...]] = ("loss", "eval_loss")
    full_rate: ClassVar = "1e-5"
    """A usual learning rate for `method: full`."""
    method: Method = "lora"
    """What to train: `lora`, an adapter; `qlora`, an adapter on a base model that bitsandbytes quantizes during training
    (arXiv:2305.14314); `full`, all weights, which gives a Model."""
    bits: Literal[4, 8] = 4
    """Bits per base weight with qlora: 4 (NF4 with double quantization) or 8 (LLM.int8(), arXiv:2208.07339)."""
    vera: Vera | None = None
    """Train a VeRA adapter instead of LoRA."""
    oft: Oft | None = None
    """Train an OFT adapter instead of LoRA."""
    ia3: Ia3 | None = None
    """Train an (IA)^3 adapter instead of LoRA."""
    max_length: int = Field(1024, ge=8)
    """Maximum length of a sequence, in tokens. A longer row is an error: truncate or drop it in the dataset stage."""
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate on the validation split every N steps."""
    early_stopping: EarlyStopping | None = None
    """Stop training when the validation loss no longer decreases."""
    save_best: bool = False
    """Train to the end, and keep the adapter or model of the evaluation with the lowest validation loss."""

    def keeps_best(self) -> bool:
        return self.save_best or self.early_stopping is not None

    def training_method(self) -> Method:
        return self.method

    def base_bits(self) -> int:
        return self.bits

    def adapter_settings(self) -> Places:
        return self.vera or self.oft or self.ia3 or self.lora

    def longest_sequence(self, row: int | None) -> int:
        return min(self.max_length, row or self.max_length)

    def positions(self, row: int | None) -> tuple[str, int]:
        return "max_length", min(self.max_length, row or self.max_length)  # positions of packed rows also start at 0

    def held_out(self) -> Iterator[tuple[str, str, str]]:
        if self.eval_steps is not None:
            yield "eval_steps", self.dataset, "validation"

    def output_type(self) -> ArtifactType:
        return "Model" if self.method == "full" else "Adapter"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from self._kind_problems()
        best = "early_stopping" if self.early_stopping else "save_best"
        if self.keeps_best() and self.eval_steps is None:
            yield Problem(best, f"found {best} without eval_steps", "set eval_steps, for example `eval_steps: 20`")
        elif self.keeps_best() and self.max_steps is not None and (self.eval_steps or 0) > self.max_steps:
            found = f"found {self.eval_steps} with {best} and max_steps {self.max_steps}, expected an evaluation before the end"
            yield Problem("eval_steps", found, "lower eval_steps")
        if self.save_best and self.early_stopping:
            yield Problem("save_best", "found save_best with early_stopping, which keeps the best as well", "remove save_best")
        if self.keeps_best() and "checkpoint_steps" in self.resources.model_fields_set:
            found = f"found checkpoint_steps with {best}, which saves at each evaluation"
            hint = "remove it; set `checkpoint_minutes` to save in between as well"
            yield Problem("resources.checkpoint_steps", found, hint)
        if self.method == "full":
            found = "with `method: full`, which trains the model's own weights"
            if "lora" in self.model_fields_set:
                yield Problem("lora", f"found lora {found}", "remove it, or set `method: lora`")
            if self.adapter is not None:
                yield Problem("adapter", f"found an adapter {found}", "merge the adapter, and name the merge stage under `model:`")
        if self.method != "qlora" and "bits" in self.model_fields_set:
            found = f"found bits with `method: {self.method}`, which quantizes nothing"
            yield Problem("bits", found, "remove it, or set `method: qlora`")
        # DoRA needs PEFT's dequantize_module_weight, which loses the scales of 8-bit weights on a CPU (0.21.2, utils/integrations.py).
        if self.method == "qlora" and self.bits == 8 and self.lora.use_dora:
            yield Problem("lora.use_dora", "found DoRA with `method: qlora` and 8 bits, expected 4 bits", "remove use_dora, or bits")
        # docs/source/fsdp_qlora.md of bitsandbytes, docs/source/accelerate/deepspeed.md of PEFT: 4-bit weights can be sharded only if
        # they are stored as floating-point numbers (bnb_4bit_quant_storage), which we do not support; 8-bit weights never.
        if self.method == "qlora" and self.resources.shards_weights:
            found = f"found {self.resources.strategy} with `method: qlora`, expected ddp, zero1, zero2 or device_map"
            yield Problem("resources.strategy", found, "set `strategy: zero2`: quantized weights cannot be sharded, but take little memory")

    def _kind_problems(self) -> Iterator[Problem]:
        """Yield problems of other adapters than LoRA."""
        others = [name for name in OTHER_ADAPTERS if getattr(self, name, None) is not None]
        given = [*(["lora"] if "lora" in self.model_fields_set else []), *others]
        for name in others:
            if given[0] != name:
                yield Problem(name, f"found {name} beside {given[0]}, expected one kind of adapter", "remove one of them")
            if not self.every_adapter:
                yield Problem(name, f"found {name} for {self.kind}, expected lora", "remove it")
            if self.method != "lora":
                yield Problem(name, f"found {name} with `method: {self.method}`, expected lora", "remove it, or set `method: lora`")
            if self.resources.strategy in ("zero3", "fsdp") and name != "adalora":
                # PEFT gathers sharded weights for LoRA only: gather_params_ctx in peft/tuners/lora.
                found = f"found {self.resources.strategy} with {name}, which PEFT computes from unsharded weights"
                yield Problem("resources.strategy", found, "set `strategy: zero2`")
            if self.added_tokens():
                yield Problem(
                    "add_tokens", f"found add_tokens with {name}, expected lora: PEFT trains tokens only beside LoRA", "remove it"
                )

    def warnings(self) -> Iterator[Problem]:
        yield from super().warnings()
        if self.method == "full" and "learning_rate" not in self.model_fields_set:
            message = f"{self.learning_rate:g}, the default, suits adapters but is too high for training all weights"
            yield Problem("learning_rate", message, f"set a lower one, for example `learning_rate: {self.full_rate}`")


class Supervised(AnswerTraining):
    """Fields and rules of a training on one answer to each prompt, whatever its loss."""

    train_on: Literal["completion", "assistant", "all"] | LastAnswers = "assistant"
    """Tokens that count in the loss: the last answer, every assistant turn, all tokens, or, with `{last: 2}`, the last two answers. Plain
    text always trains on all tokens."""
    max_length: int = Field(1024, ge=8)
    """Maximum length of a sequence, in tokens, and the length of packed sequences. A longer row is an error: truncate or drop it in the
    dataset stage."""
    packing: bool = False
    """Pack several rows into each sequence, for fewer steps. Unpacked rows are not padded either."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens to add to the tokenizer, such as `["<tool>"]`. Only their embeddings are trained beside the adapter; the head's too, where it
    is not tied to them. The tokenizer is saved with the adapter, and a merge gives a model with the larger vocabulary."""
    adalora: AdaLora | None = None
    """Train an AdaLoRA adapter instead of LoRA. Needs max_steps, by which its ranks are reduced."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """Strength of NEFTune (arXiv:2310.05914), which adds noise to the embeddings of each row in training: 5, 10 or 15."""

    def adapter_settings(self) -> Places:
        return self.adalora or super().adapter_settings()

    def added_tokens(self) -> tuple[str, ...]:
        return self.add_tokens

    def packs(self) -> bool:
        return self.packing

    def shares_sequences(self) -> bool:
        return not self.packing

    def longest_sequence(self, row: int | None) -> int:
        return self.max_length if self.packing else super().longest_sequence(row)

    def micro_batch_size(self) -> int:
        """Default to 1 with packing: packed sequences are full."""
        return self.resources.micro_batch_size or self._divisor_up_to(1 if self.packing else 8)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.method == "full" and self.add_tokens:
            found = "found add_tokens with `method: full`, which trains the model's own weights"
            yield Problem("add_tokens", found, "remove it, or set `method: lora`")
        if self.adalora:
            yield from self.adalora.problems_with(self.max_steps, self.adapter, self.resources)
        if twice := sorted({token for token in self.add_tokens if self.add_tokens.count(token) > 1}):
            yield Problem("add_tokens", f"found {', '.join(twice)} twice", "remove one of them")
        # deepspeed/runtime/sequence_parallel/ulysses_sp.py, uattn_wrapper, drops the mask that separates packed rows.
        if self.packing and self.resources.sequence_parallel_size > 1:
            found = f"found {self.resources.sequence_parallel_size} with packing, expected 1: packed rows would attend to each other"
            yield Problem("resources.sequence_parallel_size", found, "remove it, or set `packing: false`")
        if self.neftune_noise_alpha and self.resources.sequence_parallel_size > 1:
            found = f"found {self.resources.sequence_parallel_size} with neftune_noise_alpha, whose noise depends on the lengths of rows"
            yield Problem("resources.sequence_parallel_size", found, "remove one of them")


class SftStage(Supervised):
    """Fine-tune a LoRA adapter or all weights on the dataset's answers (SFT), with TRL and PEFT.

    The dataset's validation split measures progress. With packing, global_batch_size counts packed sequences.
    """

    kind: Literal["sft"]
    also_called: ClassVar = (*Supervised.also_called, "qlora", "full", "fullfinetune", "pretrain", "pt", "cpt", "instruct", "supervised")
    program: ClassVar = "tasks.training.sft"
    imports: ClassVar = ("tasks.training.checkpoints", "tasks.training.sft_trainer")
    every_adapter: ClassVar = True
    may_change_base: ClassVar = True
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label's weight that is spread over the whole vocabulary, in training alone. Needs the logits of all tokens at once, and
    a second forward pass."""

    def full_logits(self) -> bool:
        return self.label_smoothing > 0

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.label_smoothing and self.resources.sequence_parallel_size > 1:
            found = f"found {self.resources.sequence_parallel_size} with label_smoothing, which needs whole rows"
            yield Problem("resources.sequence_parallel_size", found, "remove one of them")

    def warnings(self) -> Iterator[Problem]:
        yield from super().warnings()
        if self.method != "full" and self.learning_rate < LOW_FOR_ADAPTERS and self.optim != "lion":
            # LLaMA-Factory's guide; thinkingmachines.ai/blog/lora: the best rate of LoRA is consistently 10 times that of full training.
            message = f"{self.learning_rate:g} suits the training of all weights: adapters learn best at about 10 times that"
            yield Problem("learning_rate", message, "most guides use 1e-4 to 5e-4 for LoRA, for example `learning_rate: 2e-4`")
