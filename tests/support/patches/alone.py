"""Attention that stays within a process's own tokens, as of a model whose code does not hand on that sequences are shared."""

from typing import Any

from tasks.log_filters import silence

silence()

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from tasks.training import sequences  # noqa: E402


def alone(*_: Any) -> None:
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, shared_sequence=False, **kwargs: whole(*args, **kwargs)


sequences.share = alone
