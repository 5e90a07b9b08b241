"""Checks that TRL trains what the model computes: TRL takes losses and log-probabilities from the hidden states and the head's weight.

If a model's own code does more between the two, they differ from those of its logits.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from tasks.models.padding import PADS
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from tasks.training.grpo_trainer import AdapterTrainer

CHECKED_TOKENS = 256  # of a row or a prompt: a long one's logits would need more memory than anything else
HINT = "TRL ignores what this architecture does after its last layer: use another base model"


def check_loss(trainer: Any, row: list[int]) -> None:
    """Raises StageFailed(config) unless TRL's loss equals that of the model's logits, on the beginning of a row of tokens."""
    import torch

    tokens = torch.tensor([row[:CHECKED_TOKENS]])
    batch = trainer._prepare_inputs({"input_ids": tokens})
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        try:
            trained = float(model(**batch, labels=batch["input_ids"], fused_lm_head=True).loss)
        except (AttributeError, TypeError) as error:  # TRL expects certain parts of a model
            message = f"TRL does not support this architecture, {trainer.model.config.model_type}: {error}"
            raise StageFailed("config", message, "use another base model", traceback.format_exc()) from error
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        used = float(torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten().to(logits.device)))
    if abs(trained - used) > 0.02 * used + 1e-3:  # rounding of bfloat16 is smaller
        message = f"found a loss of {trained:.4f} in training, expected that of the model's logits, {used:.4f}"
        raise StageFailed("config", message, HINT)


def check_log_probs(trainer: AdapterTrainer) -> None:
    """Raises StageFailed(config) unless TRL's log-probabilities equal those of the model's logits, and do not change by padding, which
    TRL puts before shorter prompts: some models read it as text or count its positions."""
    import torch

    ids = next(iter(trainer.prompts.values()))[:CHECKED_TOKENS]
    batch = torch.tensor([ids], device=trainer.args.device)
    padded = torch.cat([batch.new_full((1, PADS), trainer.processing_class.pad_token_id), batch], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :PADS] = 0
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trained, _, _ = trainer._get_per_token_logps_and_entropies(model, batch, torch.ones_like(batch), len(ids) - 1)
        beside, _, _ = trainer._get_per_token_logps_and_entropies(model, padded, mask, len(ids) - 1)
        logits = model(input_ids=batch).logits[0, :-1].float() / trainer.temperature
        used = logits.log_softmax(-1).gather(-1, batch[0, 1:, None])[:, 0]
    model.train()
    allowed = 0.02 * float(used.abs().mean()) + 1e-3  # rounding of bfloat16 is smaller
    if float((trained[0] - used).abs().mean()) > allowed:
        message = f"found log-probabilities of {trained.mean():.4f} in training, expected those of the model's logits, {used.mean():.4f}"
        raise StageFailed("config", message, HINT)
    if float((beside[0] - used).abs().mean()) > allowed and len(set(map(len, trainer.prompts.values()))) > 1:
        means = f"found log-probabilities of {beside.mean():.4f}, expected {used.mean():.4f}"
        message = f"padding before a prompt changes this model's output: {means}"
        raise StageFailed("config", message, "prompts of different lengths are padded: use another base model, or prompts of one length")
