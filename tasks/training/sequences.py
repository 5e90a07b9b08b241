"""Shares sequences between processes (Ulysses, arXiv:2309.14509): each holds a part of the tokens and, for attention, some heads.

Uses only DeepSpeed's exchange: each process computes its tokens' part of the loss, and gradients are summed over all processes as
usual, so it works with every strategy. accelerate's own way requires DeepSpeed, averages losses by micro-batch, and builds optimizer
steps from other rows than one process would. Left out: packed rows, sliding windows and other kinds of attention, all of which need
a mask that DeepSpeed's exchange drops.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from tasks.training.batches import lengths, longest_first
from tuneline.errors import StageFailed
from tuneline.kinds.stage import Resources

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTTrainer


SHARED = "shared_sequence"  # argument of the model's forward pass that reaches attention
LEAVE_OUT = "remove it; `gradient_checkpointing: true` and `strategy: zero3` save memory, too"
TOLERANCE = 0.02  # mean difference of log-probabilities; rounding of bfloat16 is smaller


def share(model: PreTrainedModel, resources: Resources, rows: int) -> None:
    """Make attention exchange tokens for heads in batches that `part` has cut, of `rows` rows. The process group must exist.

    Raises StageFailed(config) for a model with other than full attention, or whose heads cannot be divided.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    size, config = resources.sequence_parallel_size, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if getattr(config, "sliding_window", None) else []))
    if others := sorted(kinds - {"full_attention"}):
        message = f"resources.sequence_parallel_size: found a model with {', '.join(others)}, expected only full attention"
        raise StageFailed("config", message, LEAVE_OUT)
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if keys is None:  # DeepSpeed needs it
        message = f"resources.sequence_parallel_size: found a model of type {config.model_type} without num_key_value_heads"
        raise StageFailed("config", message, LEAVE_OUT)
    if heads % size or (keys % size and size % keys):
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0))
        message = f"resources.sequence_parallel_size: found {size}, expected {allowed}, for {heads} heads ({keys} of keys)"
        raise StageFailed("config", message, "processes exchange tokens for heads")

    deepspeed.init_distributed(torch.distributed.get_backend())
    name = config._attn_implementation
    whole = ALL_ATTENTION_FUNCTIONS[name]
    UlyssesSPAttentionHF.register_with_transformers(model, name, size, rows, seq_length_is_variable=True)
    shared = ALL_ATTENTION_FUNCTIONS[name]

    def attention(*args: Any, **kwargs: Any) -> Any:
        return (shared if kwargs.pop(SHARED, False) else whole)(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention


def part(batch: dict[str, Any], number: int, size: int) -> dict[str, Any]:
    """Return the tokens and shifted labels of process `number` of `size`. Rows must be padded to a multiple of `size`."""
    rows, length = batch["input_ids"].shape
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    positions = torch.arange(length, device=labels.device).expand(rows, length)  # without a jump at padding, which would mean packed rows
    own = slice(length // size * number, length // size * (number + 1))
    cut = {"input_ids": batch["input_ids"], "position_ids": positions, "labels": labels, "shift_labels": labels}
    return {name: tensor[:, own].contiguous() for name, tensor in cut.items()} | {SHARED: True}


class ForEachOfGroup(Sampler[int]):
    """Yields positions as `sampler` draws them, each micro-batch once per process that shares it. Fills up the last ones with the
    first positions, so that accelerate hands out whole groups."""

    def __init__(self, sampler: Sampler[int], rows: int, resources: Resources):
        self.sampler, self.rows, self.resources = sampler, rows, resources

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        short = -len(drawn) % (self.rows * self.resources.data_parallel_size)
        drawn += (drawn * short)[:short]
        for start in range(0, len(drawn), self.rows):
            for _ in range(self.resources.sequence_parallel_size):
                yield from drawn[start : start + self.rows]

    def __len__(self) -> int:
        at_once = self.rows * self.resources.data_parallel_size
        return -(-len(self.sampler) // at_once) * at_once * self.resources.sequence_parallel_size

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def check(trainer: SFTTrainer, resources: Resources) -> None:
    """Raises StageFailed(config) unless the longest rows get the same log-probabilities shared as whole."""
    size, number = resources.sequence_parallel_size, trainer.args.process_index % resources.sequence_parallel_size
    order = longest_first(range(len(trainer.train_dataset)), lengths(trainer.train_dataset))
    rows = islice(cycle(order), trainer.args.train_batch_size)  # the exchange needs whole micro-batches
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        mine = model(**part(batch, number, size), fused_lm_head=True)
        whole = torch.nn.functional.pad(model(**batch, fused_lm_head=True).log_probs, (0, 1))
    length = mine.log_probs.shape[1]
    apart = (mine.log_probs - whole[:, length * number : length * (number + 1)]).abs()
    found = torch.stack([apart.sum(), mine.label_mask.sum()]).double()
    torch.distributed.all_reduce(found)  # all processes get the same result
    if (distance := float(found[0] / found[1])) > TOLERANCE:
        place, allowed = "resources.sequence_parallel_size", f"expected at most {TOLERANCE}"
        message = f"{place}: found log-probabilities that differ by {distance:.3f} a token between shared and whole sequences, {allowed}"
        raise StageFailed("config", message, LEAVE_OUT)
    print(f"{size} processes share each sequence: log-probabilities differ by {distance:.1e} from those of whole ones", flush=True)
