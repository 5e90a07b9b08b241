"""Fields and rules of LoRA, under PEFT's names, and which parts of a model an adapter selects."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.engine import MAX_LORA_RANK
from tuneline.kinds.fields import Strict

ALL = "all-linear"
PRESETS = {"attention": {"attention"}, "mlp": {"mlp"}, "attention+mlp": {"attention", "mlp"}}
"""Presets of target_modules, and the parts of a decoder layer that each selects."""
NAMES = re.compile(r"\w[\w-]*(\s*,\s*\w[\w-]*)*")  # names where a regular expression is expected
INITS = re.compile(r"gaussian|pissa(_niter_[1-9]\d*)?|olora|eva|loftq")
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Places(Strict):
    """Which layers of a model get an adapter, of any kind."""

    kind: ClassVar[str]
    """The field of a stage that configures this kind."""
    dropout_field: ClassVar[str | None] = None
    """Its field for the dropout probability, if it has one."""
    target_modules: Names | str = ALL
    """Modules that get an adapter: names of linear layers and expert tensors; `all-linear` for all of them except the output head; the
    presets `attention`, `mlp` or `attention+mlp`; or a regular expression that matches full names."""
    exclude_modules: Names | str | None = None
    """Modules that get none, although target_modules selects them: names, or a regular expression that matches full names."""
    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Numbers of the decoder layers that get an adapter, counted from 0; all by default."""
    modules_to_save: Names | None = None
    """Other modules that are trained whole and saved with the adapter, such as `[embed_tokens, lm_head]`: names as in target_modules. Where
    embeddings and head are one tied weight, it stays one."""

    @abstractmethod
    def parameters(self, name: str, inputs: int, outputs: int) -> int:
        """Return the trained parameters at a linear layer."""

    def inner_size(self, name: str) -> int:
        """Return the numbers per token that the adapter of a layer keeps beside its input."""
        return 0

    def dropout(self) -> float:
        """Return the dropout probability in training."""
        return float(getattr(self, self.dropout_field)) if self.dropout_field else 0.0

    def as_saved(self) -> Self:
        """Return the settings of the saved adapter, which fits the unchanged base."""
        return self

    def unserved(self) -> str | None:
        """Return what vLLM cannot serve, or None: vllm/lora/peft_helper.py, vllm/config/lora.py (ranks)."""
        return f"{self.kind}, but vLLM serves only LoRA"

    def problems(self) -> Iterator[Problem]:
        """Yield problems of these fields, named relative to this model."""
        for field in ("target_modules", "exclude_modules"):
            given = getattr(self, field)
            if not isinstance(given, str) or (field == "target_modules" and (given == ALL or given in PRESETS)):
                continue
            known = f", {ALL}, {', '.join(PRESETS)}" if field == "target_modules" else ""
            expected = f"expected a list of names{known} or a regular expression that matches full names"
            if NAMES.fullmatch(given):
                names = ", ".join(re.findall(r"[\w.-]+", given))
                hint = f"write `{field}: {ALL}`" if given == "all" else f"write `{field}: [{names}]`"
                yield Problem(field, f"found the name {given}, {expected}", hint)
                continue
            try:
                re.compile(given)
            except re.error as error:
                yield Problem(field, f"found {given}, which is no regular expression ({error}), {expected}")

    def by_name(self) -> bool:
        """Return whether PEFT selects the same layers by target_modules alone."""
        plain = self.target_modules == ALL or not isinstance(self.target_modules, str)
        return plain and self.exclude_modules is None and self.layers_to_transform is None

    def selects(self, name: str, part: str) -> bool:
        """Return whether a layer gets an adapter. `part` of a decoder layer: `attention`, `mlp`, or neither."""
        wanted = self.target_modules
        preset = PRESETS.get(wanted) if isinstance(wanted, str) else None
        targeted = part in preset if preset else wanted == ALL or matches(name, wanted)
        number = re.search(r"\.(\d+)\.", name)
        numbered = self.layers_to_transform is None or (number is not None and int(number[1]) in self.layers_to_transform)
        return targeted and numbered and not (self.exclude_modules and matches(name, self.exclude_modules))


class Lora(Places):
    """Low-rank adapter (LoRA), under PEFT's names."""

    kind: ClassVar = "lora"
    dropout_field: ClassVar = "lora_dropout"
    r: int = Field(16, ge=1, le=1024)
    """Rank; a higher rank has more capacity and needs more memory."""
    lora_alpha: float = Field(32, gt=0)
    """Scaling numerator: the update is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapter's inputs during training."""
    rank_pattern: Mapping[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Ranks of some layers, by a name or a regular expression that matches the end of full names: `{down_proj: 32}`. The first match
    counts."""
    alpha_pattern: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """lora_alpha of some layers, by name like rank_pattern."""
    init_lora_weights: bool | str = True
    """First weights: `true`, random A and B of zeros; `gaussian`, another distribution of A; `pissa` (arXiv:2404.02948) and `olora`
    (arXiv:2406.01775), the principal part of the base's weights, `pissa_niter_N` by a fast approximation of N iterations; `eva`
    (arXiv:2410.07170), A from activations on the train split; `loftq` (arXiv:2310.08659), of `method: qlora`, what 4 bits lose of the
    base's weights. The saved adapter fits the unchanged base; that of pissa, olora and loftq has twice the rank."""
    lora_plus_ratio: float = Field(1.0, ge=1)
    """Learning rate of B divided by that of A (LoRA+, arXiv:2402.12354); the authors use 16, and a lower learning_rate."""
    use_rslora: bool = False
    """Use rank-stabilized scaling (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Use weight-decomposed adapters (DoRA, arXiv:2402.09353): often more accurate, but slower."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                try:
                    re.compile(key)
                except re.error as error:
                    yield Problem(field, f"found {key}, expected a name or a regular expression ({error})")

        yield from self._init_problems()

    def _init_problems(self) -> Iterator[Problem]:
        init, field = self.init_lora_weights, "init_lora_weights"
        if init is not True and not (isinstance(init, str) and INITS.fullmatch(init)):
            yield Problem(field, f"found {str(init).lower()}, expected true, gaussian, pissa, pissa_niter_N, olora, eva or loftq")
        if self.starts_apart():
            if self.use_dora:  # peft/tuners/lora/model.py, subtract_mutated_init, keeps only A and B
                yield Problem(field, f"found {init} with use_dora, whose magnitudes PEFT cannot convert", "remove one of them")
            if self.use_rslora and (self.rank_pattern or self.alpha_pattern):  # _convert_state_dict_for_initial_model, same file
                found = f"found {init} with use_rslora and rank_pattern or alpha_pattern, which PEFT cannot convert"
                yield Problem(field, found, "remove use_rslora, or the patterns")

    def changes_base(self) -> bool:
        """Return whether the adapter starts with a part of the base's weights, which the base then lacks in training."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))

    def starts_apart(self) -> bool:
        """Return whether the first weights are not for the unchanged base: with them it would be another model."""
        return self.changes_base() or self.init_lora_weights == "loftq"

    def as_saved(self) -> Self:
        """Double the ranks if the adapter starts apart: beside the trained part, the saved adapter subtracts the initial one, as by PEFT's
        `path_initial_model_for_weight_conversion`."""
        if not self.starts_apart():
            return self
        doubled = {
            "r": 2 * self.r,
            "lora_alpha": self.lora_alpha * (math.sqrt(2) if self.use_rslora else 2),
            "rank_pattern": {key: 2 * rank for key, rank in self.rank_pattern.items()},
            "alpha_pattern": {key: 2 * alpha for key, alpha in self.alpha_pattern.items()},
        }
        return self.model_copy(update=doubled)

    def rank_of(self, name: str) -> int:
        """Return the rank at a layer, by its full name."""
        return next((rank for key, rank in self.rank_pattern.items() if at_end(key, name)), self.r) if self.rank_pattern else self.r

    def highest_rank(self) -> int:
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r

    def parameters(self, name: str, inputs: int, outputs: int) -> int:
        return self.rank_of(name) * (inputs + outputs) + (outputs if self.use_dora else 0)

    def inner_size(self, name: str) -> int:
        return self.rank_of(name)

    def unserved(self) -> str | None:
        if self.use_dora:
            return "DoRA, which vLLM does not serve"
        if self.modules_to_save:
            return "modules_to_save, which vLLM does not serve"
        highest = self.as_saved().highest_rank()
        return f"rank {highest}, but vLLM serves at most {MAX_LORA_RANK}" if highest > MAX_LORA_RANK else None


def matches(name: str, targets: tuple[str, ...] | str) -> bool:
    """Return whether PEFT matches a full name: names by its end, a regular expression by all of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def at_end(key: str, name: str) -> bool:
    """Return whether a key of rank_pattern means a layer: `get_pattern_key` of peft/utils/other.py."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
