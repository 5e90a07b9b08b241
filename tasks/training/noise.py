"""Adds NEFTune's noise to embeddings in training (arXiv:2310.05914).

transformers' own hook divides by the length of the padded batch, so its noise depends on the micro-batch and on the rows beside a
row. Here a row's own length counts, as in the authors' code (github.com/neelsjain/NEFTune).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add_noise(model: PreTrainedModel, alpha: float) -> None:
    """Add uniform noise of at most alpha / sqrt(tokens of the row * width) to each embedding, while the model trains."""
    import torch

    rows: dict[str, torch.Tensor] = {}  # of the batch in the model

    def before(decoder: torch.nn.Module, args: Any, given: dict[str, Any]) -> None:
        if decoder.training:  # checks before the training give no mask
            rows["lengths"] = lengths(given)

    def after(embeddings: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not embeddings.training:
            return output
        most = alpha / (rows["lengths"] * output.shape[-1]).sqrt()
        return output + (torch.empty_like(output).uniform_(-1, 1) * most[..., None]).to(output.dtype)

    model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(after)


def lengths(batch: dict[str, Any]) -> torch.Tensor:
    """Return the number of tokens of each token's row, of shape (rows, 1) for padded rows, or (1, tokens) for joined ones."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.sum(dim=1, keepdim=True)
    row = (batch["position_ids"][0] == 0).cumsum(0) - 1
    return row.bincount()[row][None]
