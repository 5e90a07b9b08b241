"""TRL's SFTTrainer with losses that do not depend on how the rows were spread over micro-batches.

TRL weighs the training loss by token over a whole step, but averages the validation loss over batches: halving the
micro-batch would change which adapter early stopping keeps. Only `tasks.sft` imports this, inside `run`: it subclasses.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer


class TokenWeightedTrainer(SFTTrainer):  # type: ignore[misc]
    step_tokens = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, label_tokens = super().get_batch_samples(*args, **kwargs)
        self.step_tokens = int(label_tokens)  # of all processes
        return samples, label_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's label tokens, so that a resumed training can sum them over its restored history."""
        if "loss" in logs:
            logs["trained_tokens"] = self.step_tokens
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != -100).sum().to(loss.device)
        self._evaluated += torch.stack([loss * tokens, tokens]).double()
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL writes one with each checkpoint, and artifacts hold no README."""
