"""What the stage kinds that train on preferences share: a reference model, and what TRL cannot do with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from tuneline.errors import Problem
from tuneline.kinds.sft import AnswerTraining


class PreferenceTraining(AnswerTraining):
    """Fields and rules of a training that compares the model with a reference: itself, as it was before the training."""

    every_adapter: ClassVar = True
    full_rate: ClassVar = "5e-7"  # the alignment handbook's for Zephyr
    learning_rate: float = Field(5e-6, gt=0, le=1)
    """Peak learning rate, reached after warm-up."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is kept near the reference, the model before the training; higher values keep it nearer."""

    def copies_base(self) -> bool:
        return self.method == "full"

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        settings = self.adapter_settings()
        if settings.dropout():
            # trl/trainer/dpo_config.py, disable_dropout
            found = f"found {settings.dropout()}, expected 0 for {self.kind}: the model is compared with a reference without dropout"
            yield Problem(f"{settings.kind}.{settings.dropout_field}", found, "remove it")
        if self.resources.sequence_parallel_size > 1:
            # trl/trainer/dpo_trainer.py and kto_trainer.py do not implement it.
            size = self.resources.sequence_parallel_size
            found = f"found {size} for {self.kind}, expected 1: TRL supports sequence parallelism only for sft"
            yield Problem("resources.sequence_parallel_size", found, "remove it")
