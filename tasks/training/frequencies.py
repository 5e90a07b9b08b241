"""Refuses trainings in whose batches a long row would change what is computed for a shorter one.

The rotary frequencies of `longrope` (Phi-3, Phi-4-mini) are others above a number of tokens, and transformers decides by the longest row
of a batch for all of them (modeling_rope_utils.py, longrope_frequency_update). So the result would depend on the micro-batch size, which
is in no key, and a row would be trained as no server computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.models.padding import switches_at
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALONE = "set `resources: {micro_batch_size: 1}`, which changes no result"


def check_frequencies(model: PreTrainedModel, lengths: Sequence[int], hint: str) -> None:
    """Raises StageFailed(config) if rows with these numbers of tokens, computed together, need different frequencies."""
    border = switches_at(model)
    if min(lengths) <= border < max(lengths):
        found = f"found rows of {min(lengths)} to {max(lengths)} tokens in the same batches"
        why = f"the model's rotary frequencies are others above {border:.0f} tokens (longrope), and the longest row would decide for all"
        shorter = f"`max_length: {border:.0f}` in the dataset stage drops or cuts the long ones"
        raise StageFailed("config", f"{found}: {why}", f"{hint}; {shorter}" if hint else shorter)
