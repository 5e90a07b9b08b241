"""Adds tokens to a tokenizer, and rows for them to a model, before a training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.models.targets import Targets


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


def make_room(model: PreTrainedModel, found: Targets, numbers: list[int], seed: int) -> Targets:
    """Give the model rows for added tokens, and return targets that train them, and the head's too unless it is tied, which PEFT sees.

    transformers draws new rows around the mean of the others; the seed decides. Raises StageFailed(config) if an embedding is also
    trained whole.
    """
    import torch

    names = {id(module): name for name, module in model.named_modules()}
    places = [names[id(model.get_input_embeddings())]]
    if not model.config.get_text_config().tie_word_embeddings:
        places.append(names[id(model.get_output_embeddings())])
    if both := sorted(set(places) & set(found.modules)):
        message = f"add_tokens: found modules_to_save with {both[0]}, whose rows for these tokens would be trained twice"
        raise StageFailed("config", message, "remove it from modules_to_save")
    if max(numbers) >= model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(max(numbers) + 1)
    return replace(found, tokens={place: tuple(numbers) for place in places})


def show_bias(model: PeftModel) -> None:
    """Let TRL read the bias of a head whose rows are trained: it takes `head.bias`, which PEFT's wrapper does not pass on."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.__dict__["bias"] = head.original_module.bias  # not as a parameter, which would be saved twice
