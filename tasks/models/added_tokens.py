"""Adds tokens to a tokenizer, and rows for them to a model, before a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...], known: bool) -> list[int]:
    """Add tokens, and return their numbers. `known`: an earlier training has added them.

    They are no special tokens: rows may contain them, and decoding shows them. Raises StageFailed(config) for tokens that the
    tokenizer has already.
    """
    from transformers import AddedToken

    there = tokenizer.get_vocab()
    if wrong := [token for token in tokens if (token in there) != known]:
        found = f"add_tokens: found {', '.join(wrong)}, which the tokenizer {'does not have' if known else 'has already'}"
        raise StageFailed("config", found, "write the `add_tokens` of the stage that made the adapter" if known else "remove it")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if not known])
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def enlarge(model: PreTrainedModel, size: int, seed: int) -> None:
    """Give the model at least `size` tokens. transformers draws new rows around the mean of the others; the seed decides."""
    import torch

    if size > model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(size)


def show_bias(model: PeftModel) -> None:
    """Let TRL read the bias of a head whose rows are trained: it takes `head.bias`, which PEFT's wrapper does not pass on."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.__dict__["bias"] = head.original_module.bias  # not as a parameter, which would be saved twice
