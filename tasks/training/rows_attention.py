"""Attention within each row of a flattened micro-batch, registered with transformers as `by_rows`.

A mask over the whole micro-batch would cost the square of all its tokens. Here each row attends alone: on CPUs by torch's sdpa, row by
row; on GPUs by torch's variable-length flash attention, in one kernel. Rows come from `cu_seq_lens_q`, which TRL's collator adds and
transformers passes on to attention: flash_attention_2 reads it, too. A batch without it is computed by sdpa, as if nothing was
registered. `tasks.training.flattening` decides who uses this, and checks it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_ROWS = "by_rows"
OF_ROWS = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # further arguments of the collator, which sdpa does not know


def register() -> None:
    AttentionInterface.register(BY_ROWS, attend_by_rows)
    AttentionMaskInterface.register(BY_ROWS, mask_within_rows)


def mask_within_rows(*, q_length: int, attention_mask: torch.Tensor | None = None, **given: Any) -> torch.Tensor | None:
    """Return None where attention is causal: no row sees another anyway. For windows, chunks and other patterns return sdpa's mask, from
    which each row takes its own square."""
    local = given.get("local_size")
    if attention_mask is None and not given.get("use_vmap") and (local is None or q_length < local):
        return None
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, attention_mask=attention_mask, **given)
    return mask


def attend_by_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Return the output of shape (1, tokens, heads, width). Queries, keys and values have the shape (1, heads, tokens, width)."""
    longest = given.get("max_length_q", 0)
    given = {name: each for name, each in given.items() if name not in OF_ROWS}
    if cu_seq_lens_q is None or len(cu_seq_lens_q) == 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    if query.is_cuda and attention_mask is None and not given.get("dropout"):
        return attend_in_one_kernel(query, key, value, cu_seq_lens_q, longest, given.get("scaling")), None
    borders = list(pairwise(cu_seq_lens_q.tolist()))
    # Split, not sliced: the gradient of a slice is as large as the whole.
    rows = zip(*(each.split([end - start for start, end in borders], 2) for each in (query, key, value)), strict=True)
    squares = [None if attention_mask is None else attention_mask[:, :, start:end, start:end] for start, end in borders]
    outputs = [sdpa_attention_forward(module, *row, square, **given)[0] for row, square in zip(rows, squares, strict=True)]
    return torch.cat(outputs, 1), None


def attend_in_one_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scaling: float | None
) -> torch.Tensor:
    """Use torch.nn.attention.varlen, which takes the shape (tokens, heads, width) in 16 bits. Autocast does not know it."""
    from torch.nn.attention.varlen import varlen_attn

    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query, key, value = (each[0].transpose(0, 1).to(kind) for each in (query, key, value))
    output = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return output[None]
