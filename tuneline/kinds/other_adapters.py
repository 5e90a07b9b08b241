"""Fields and rules of adapters other than LoRA, under PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.adapters import Names, Places, matches
from tuneline.kinds.stage import Resources


class AdaLora(Places):
    """LoRA that takes ranks from layers which need them least while it trains (AdaLoRA, arXiv:2303.10512), under PEFT's names."""

    kind: ClassVar = "adalora"
    dropout_field: ClassVar = "lora_dropout"
    init_r: int = Field(12, ge=2, le=256)  # PEFT divides by it in the base's type, and bfloat16 has no odd numbers above
    """First rank of each layer."""
    target_r: int = Field(8, ge=1, le=256)
    """Final rank, as the layers' mean."""
    lora_alpha: float = Field(32, gt=0)
    """Scaling numerator: the update is multiplied by lora_alpha / init_r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapter's inputs during training."""
    tinit: int = Field(0, ge=0)
    """Number of first steps, in which no rank is taken."""
    tfinal: int = Field(0, ge=0)
    """Number of last steps, in which ranks stay."""
    deltaT: int = Field(1, ge=1)
    """Number of steps between two reductions."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the mean of a weight's importance."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the mean of its uncertainty."""
    orth_reg_weight: float = Field(0.5, ge=0)
    """Weight of a penalty for singular vectors that are not orthogonal. It is part of the training's loss."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.target_r >= self.init_r:
            yield Problem("target_r", f"found {self.target_r}, expected less than init_r, {self.init_r}", "`lora:` has ranks that stay")

    def problems_with(self, steps: int | None, adapter: str | None, resources: Resources) -> Iterator[Problem]:
        """Yield problems with a stage's other fields. `steps`: its max_steps."""
        if steps is None:
            yield Problem("adalora", "found adalora without max_steps, by which its ranks are reduced", "set `max_steps: 500`, for example")
        elif self.tinit + self.tfinal >= steps:
            found = f"found tinit {self.tinit} and tfinal {self.tfinal} of {steps} steps, which leaves none to reduce ranks in"
            yield Problem("adalora.tinit", found, "lower one of them")
        if adapter is not None:
            yield Problem("adalora", "found adalora with `adapter`, whose ranks are allotted", "merge the adapter first")
        if resources.strategy != "ddp" or resources.sequence_parallel_size > 1:
            # peft/tuners/adalora/layer.py: update_ipt needs the gradients of whole weights after the optimizer's step, and
            # mask_to_budget compares all layers on one device.
            field = "strategy" if resources.strategy != "ddp" else "sequence_parallel_size"
            found = f"found {getattr(resources, field)} with adalora, whose ranks PEFT allots only with ddp"
            yield Problem(f"resources.{field}", found, "remove it")

    def parameters(self, name: str, inputs: int, outputs: int) -> int:
        return self.init_r * (inputs + outputs + 1)

    def inner_size(self, name: str) -> int:
        return self.init_r


class Vera(Places):
    """Adapter of vectors between random matrices that all layers share (VeRA, arXiv:2310.11454), under PEFT's names."""

    kind: ClassVar = "vera"
    dropout_field: ClassVar = "vera_dropout"
    r: int = Field(256, ge=1, le=8192)
    """Rank of the shared matrices; as only vectors are trained, it is higher than LoRA's."""
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapter's inputs during training."""
    d_initial: float = Field(0.1, gt=0)
    """First value of the vector between the matrices."""
    projection_prng_key: int = Field(0, ge=0)
    """Seed of the shared matrices."""
    save_projection: bool = True
    """Save the shared matrices with the adapter. Otherwise they are drawn again by projection_prng_key, which may differ elsewhere."""

    def parameters(self, name: str, inputs: int, outputs: int) -> int:
        return self.r + outputs

    def inner_size(self, name: str) -> int:
        return self.r


class Oft(Places):
    """Adapter that rotates blocks of each layer's input (OFT, arXiv:2306.07280), under PEFT's names."""

    kind: ClassVar = "oft"
    dropout_field: ClassVar = "module_dropout"
    oft_block_size: int = Field(32, ge=2)
    """Size of a rotated block; it divides the layers' input sizes. Larger blocks have more parameters."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a block is left unrotated during training."""
    coft: bool = False
    """Constrain the rotation to a distance of eps."""
    eps: float = Field(6e-5, gt=0)
    """Largest rotation with coft."""
    use_cayley_neumann: bool = True
    """Compute rotations by a series, which is faster but approximate, instead of by an inverse."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if "eps" in self.model_fields_set and not self.coft:
            yield Problem("eps", f"found {self.eps:g} without coft, which alone uses it", "remove it, or set `coft: true`")

    def parameters(self, name: str, inputs: int, outputs: int) -> int:
        return inputs * (self.oft_block_size - 1) // 2


class Ia3(Places):
    """Adapter that scales outputs of attention and inputs of feed-forward layers by vectors ((IA)^3, arXiv:2205.05638), by PEFT."""

    kind: ClassVar = "ia3"
    target_modules: Names | str = ("k_proj", "v_proj", "down_proj")
    """Modules that get a vector, like those of `lora`; by default those of the paper by Llama's names."""
    feedforward_modules: tuple[str, ...] = ("down_proj",)
    """Those of target_modules of which the input is scaled instead of the output."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        targets = self.target_modules
        strange = [name for name in self.feedforward_modules if not isinstance(targets, str) and name not in targets]
        if strange and "feedforward_modules" in self.model_fields_set:
            yield Problem("feedforward_modules", f"found {', '.join(strange)}, expected some of target_modules: {', '.join(targets)}")

    def parameters(self, name: str, inputs: int, outputs: int) -> int:
        return inputs if matches(name, self.feedforward_modules) else outputs
