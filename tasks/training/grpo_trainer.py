"""TRL's GRPOTrainer with tokenized prompts, which also keeps completions for users.

Only `tasks.training.grpo` imports this, inside `run`, because it subclasses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from tasks.data.masks import in_the_order_of
from tasks.data.rows import Row
from tasks.data.thoughts import said, written
from tasks.training.optimizers import OptimizedByStage
from tuneline.workspace.protocol import Events

SHOWN_STEPS = 20  # about this many steps of a training emit a completion as an event
TAIL = 400  # characters of a prompt kept with each completion


class EpochSampler(RepeatSampler):
    """Seeds each epoch. TRL's sampler uses one generator for all epochs, which a resumed training would restart at the first one."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class AdapterTrainer(OptimizedByStage, GRPOTrainer):
    def __init__(self, *args: Any, prompts: dict[str, list[int]], rows: dict[str, Row], samples: Path, events: Events, **kwargs: Any):
        """`prompts` are the token ids of each prompt, `rows` the row of each; every completion is written to `samples`, one line
        each."""
        self.prompts, self.rows, self.samples, self.events = prompts, rows, samples, events
        self._resuming = True  # until the first completions
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = EpochSampler
        return sampler  # type: ignore[no-any-return]

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [list(self.prompts[prompt]) for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if self.accelerator.is_main_process:
            self._keep()
        return output

    def _calculate_rewards(self, inputs: list[dict[str, Any]], prompts: list[str], completions: list[str], ids: list[list[int]]) -> Any:
        """Adds what each completion says without its thoughts, for rewards that compare answers."""
        words, ends = self.processing_class, set(self.eos_token_ids)
        texts = [said(written(each, words, ends), prompt, words) for each, prompt in zip(ids, prompts, strict=True)]
        asked = [self.rows[prompt] for prompt in prompts]
        texts = [in_the_order_of(row, text, words) if row.calls() else text for row, text in zip(asked, texts, strict=True)]
        inputs = [one | {"said": text} for one, text in zip(inputs, texts, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, ids)

    def step_rows(self) -> list[Row]:
        """Return the rows of the last completions: those of all processes, in the first process."""
        return [self.rows[prompt] for prompt in dict.fromkeys(self._logs["prompt"])] if self.accelerator.is_main_process else []

    def _keep(self) -> None:
        """Write the completions that were just scored, and emit the best and the worst of some steps as events."""
        step = self.state.global_step + 1  # counted from 1, as everywhere else
        logged = zip(self._logs["prompt"], self._logs["completion"], self._logs["advantages"], strict=True)
        lines = []
        for i, (prompt, completion, advantage) in enumerate(logged):
            rewards = {name: values[i] for name, values in self._logs["rewards"].items()}
            reward = sum(weight * value for weight, value in zip(self.reward_weights.tolist(), rewards.values(), strict=True))
            row = self.rows[prompt]
            record = {"step": step, "id": row.id, "prompt": prompt[-TAIL:], "answer": row.answer, "completion": completion}
            lines.append(record | {"reward": reward, "rewards": rewards, "advantage": advantage})
        if self._resuming and self.samples.exists():  # steps after the checkpoint are sampled again
            earlier = self.samples.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in earlier if line.endswith("\n") and json.loads(line)["step"] < step]
            self.samples.write_text("".join(kept), encoding="utf-8")
        self._resuming = False
        with self.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if (step - 1) % max(1, self.state.max_steps // SHOWN_STEPS) == 0:
            best = max(lines, key=lambda line: line["reward"])
            worst = min(lines, key=lambda line: line["reward"])
            for line in (best, worst) if best["reward"] > worst["reward"] else (best,):
                text = f"step {step}, reward {line['reward']:.3f}\n{line['prompt']}\n--- completion: {line['completion']}"
                self.events.sample(text, line)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL would write one with each checkpoint, but artifacts hold no README."""
