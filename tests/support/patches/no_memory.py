"""Has the second process of an evaluation run out of memory in its first batch."""

import os
from typing import Any

import torch

from tasks.evaluation.harness import LanguageModel

REAL = LanguageModel._greedy


def greedy(self: LanguageModel, *given: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return REAL(self, *given)


LanguageModel._greedy = greedy  # type: ignore[method-assign]
