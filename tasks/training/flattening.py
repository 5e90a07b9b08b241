"""Flattens the rows of a micro-batch into one sequence, without padding, if the model computes for each row what it computes for it alone.

Positions start at 0 in each row. Whether rows see one another is tried on the model that is about to train, with its longest rows:
the states of Mamba or RWKV, convolutions and some kinds of positions reach over the border. Such models train with padding; the
manifest has the reason. Left out: attention by other implementations than torch's sdpa and flash attention, float32 on GPUs (no kernel
for rows of different lengths), and processes that share sequences.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from tasks.training.batches import lengths, longest_first
from tasks.training.rows_attention import BY_ROWS, register
from tasks.training.sft_checks import check_batch
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.training.sft_trainer import TokenWeightedTrainer
    from tuneline.kinds.sft import Supervised

BORDER = 4  # tokens of a row that are compared: what a state carries over the border fades within a few
EXACT = 1e-3, 1e-3  # allowed difference from the row alone, and beside another row; a share of its hidden states
ROUNDED = 0.1, 0.03  # the same if bfloat16 or quantized layers compute
FAILURES = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)  # of a model without support


def lay_out(trainer: TokenWeightedTrainer, stage: Supervised) -> None:
    """Choose how rows share a micro-batch, and note it for the manifest."""
    trainer.info["micro_batches"] = layout(trainer, stage)
    print(f"micro-batches: {trainer.info['micro_batches']}", flush=True)


def layout(trainer: TokenWeightedTrainer, stage: Supervised) -> str:
    """Flatten the trainer's micro-batches if the model keeps their rows apart. Return what was chosen, and why.

    Raises StageFailed(config) if it does not, and the rows are packed.
    """
    model = trainer.model.get_base_model() if stage.method != "full" else trainer.model
    usual = model.config._attn_implementation
    if stage.packing and all(len(sequence) == 1 for sequence in trainer.train_dataset["seq_lengths"]):
        return "packed, one row in each sequence"
    if trainer.args.train_batch_size == 1 and not stage.packing:
        return "one row in each micro-batch"
    problem = unsuited(model, trainer, stage)
    if problem is None:
        if usual == "sdpa":
            register()
            model.set_attn_implementation(BY_ROWS)
        problem = seen_problem(trainer, stage)
    if problem and stage.packing:
        model.set_attn_implementation(usual)
        problem = seen_problem(trainer, stage)
    if problem is None:
        trainer.flatten()
        check_batch(trainer.train_dataset, trainer.data_collator)
        return f"{'packed' if stage.packing else 'flattened'}, attention {model.config._attn_implementation}"
    if stage.packing:
        raise StageFailed("config", f"packing: {problem}", "set `packing: false`")
    model.set_attn_implementation(usual)
    return f"padded: {problem}"


def unsuited(model: PreTrainedModel, trainer: TokenWeightedTrainer, stage: Supervised) -> str | None:
    """Return what rules out flattening before it is tried, or None."""
    usual, sharded = model.config._attn_implementation, stage.resources.strategy in ("zero3", "fsdp")
    if stage.resources.sequence_parallel_size > 1:
        return "processes share sequences"
    if stage.resources.compile:  # attention by rows would break the graph in each layer
        return "the model is compiled"
    if usual == "sdpa" and trainer.args.device.type == "cuda" and not (trainer.args.bf16 or model.dtype.itemsize == 2):
        return "found float32 on a GPU"
    if usual != "sdpa" and not usual.startswith("flash_attention"):
        return f"found attention by {usual}, expected sdpa or flash attention"
    if not model._can_set_attn_implementation() or "kwargs" not in inspect.signature(model.forward).parameters:
        return f"found a model of type {model.config.model_type}, which passes no boundaries of rows to its attention"
    if sharded and getattr(model, "_is_stateful", False):  # an error in one of its layers would leave gathered weights behind
        return "found a model with states"
    return None


def seen_problem(trainer: TokenWeightedTrainer, stage: Supervised) -> str | None:
    """Return why the model does not keep rows apart, or None. All processes get the same answer."""
    together, beside, alone, first = samples(trainer, stage)
    trainer.model_wrapped.eval()
    problem: str | None = None
    try:
        hidden = [states(trainer, rows)[:, start : start + BORDER] for rows, start in ((together, first), (beside, first), (alone, 0))]
        scale = hidden[2].abs().mean()
        from_alone, from_beside = (float((hidden[0] - other).abs().mean() / scale) for other in (hidden[2], hidden[1]))
        rounds = trainer.args.bf16 or stage.method == "qlora"
        allowed = ROUNDED if rounds else EXACT
        if not (from_alone <= allowed[0] and from_beside <= allowed[1]):  # also if not finite
            what = f"{'packed' if stage.packing else 'flattened'} rows attend to one another"
            problem = f"found a base model whose {what}"
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:  # some layers separate rows only in kernels that this runtime lacks
        problem = str(error).strip().split("\n")[0] or type(error).__name__
    found = trainer.accelerator.reduce(torch.tensor(float(problem is not None), device=trainer.args.device), reduction="sum")
    return problem or ("found another problem in another process" if found else None)


def samples(
    trainer: TokenWeightedTrainer, stage: Supervised
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], int]:
    """Return two rows together, the second one beside other tokens, the second one alone, and the first one's length."""
    data = trainer.train_dataset
    if stage.packing:
        sequence = next(sequence for sequence in data if len(sequence["seq_lengths"]) > 1)
        first, *others = sequence["seq_lengths"]
        ids = sequence["input_ids"]
        together, beside = ({"seq_lengths": [first, *others], "input_ids": each + ids[first:]} for each in (ids[:first], ids[:first][::-1]))
        return [together], [beside], [{"seq_lengths": others, "input_ids": ids[first:]}], first
    longest = longest_first(range(len(data)), lengths(data))
    one, other = ({"input_ids": data[row]["input_ids"]} for row in (longest[0], longest[min(1, len(longest) - 1)]))
    return [one, other], [{"input_ids": one["input_ids"][::-1]}, other], [other], len(one["input_ids"])


def states(trainer: TokenWeightedTrainer, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return the last hidden states of flattened rows, in float32."""
    batch = trainer.flat_collator()(rows)
    del batch["labels"]
    with torch.no_grad(), trainer.compute_loss_context_manager():
        output = trainer.model_wrapped(**trainer._prepare_inputs(batch), output_hidden_states=True, logits_to_keep=1)
    return output.hidden_states[-1].float()
