"""Trains B of LoRA at a higher learning rate than A (LoRA+, arXiv:2402.12354), by PEFT."""

from __future__ import annotations

from typing import Any


class LoraPlus:
    """Makes a trainer use LoRA+; goes before the trainer among the bases of a class."""

    lora_plus_ratio = 1.0
    """The learning rate of B divided by that of A."""

    def create_optimizer(self, model: Any = None) -> Any:
        from peft.optimizers import create_loraplus_optimizer

        trainer: Any = self
        if self.lora_plus_ratio == 1 or trainer.optimizer is not None:
            return super().create_optimizer(model)  # type: ignore[misc]
        whole = trainer.model if model is None else model
        optimizer_class, given = trainer.get_optimizer_cls_and_kwargs(trainer.args, whole)
        rates = {"lr": given.pop("lr"), "loraplus_lr_ratio": self.lora_plus_ratio, "loraplus_weight_decay": trainer.args.weight_decay}
        trainer.optimizer = create_loraplus_optimizer(whole, optimizer_class, **rates, **given)
        return trainer.optimizer
