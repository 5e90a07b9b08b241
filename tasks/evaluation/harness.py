"""Extends lm-eval's Hugging Face model: it reports progress, limits memory, and stops where answers end.

Imported only by programs that score a model: torch and lm-eval take seconds to import. lm-eval's own tasks and ours call the same two
methods, `generate_until` and `_loglikelihood_tokens`; both sort requests by length, longest first, and batch them.

Greedy generation is implemented here: transformers computes rows that have ended until the last row of a batch ends; here a row
leaves the batch with its end token or stop text. Sampling is left to transformers. Stop texts are searched only after an answer's
thoughts: lm-eval would cut a model that thinks at the first line end of its thoughts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from tasks.data.rendering import ends
from tasks.data.thoughts import cut, marks, spoken, until, written
from tasks.models.padding import padding_matters, takes_cache
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPS = "stops"  # option of a request, in place of lm-eval's `until`
LOGITS_BYTES = 2**31  # limit of one batch's logits and log-probabilities, in float32


class LanguageModel(HFLM):
    one_by_one = False
    """Whether answers are generated one row at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, events: Events):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.events, self.largest_batch, self.phase = events, batch_size, ""
        self.done = self.total = self.stopped = 0
        self.with_special = False
        self.thinks = bool(marks(tokenizer).start)
        """Whether the template marks thoughts, which answers to benchmarks are then compared without."""
        self.ends = set(ends(tokenizer, model.generation_config.eos_token_id))
        model.config.use_cache = False  # scoring needs none; xLSTM's cache does not fit its own states
        # Keep only the end tokens of the model's generation config: its penalties and temperature would change greedy decoding.
        model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends), pad_token_id=tokenizer.pad_token_id)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers as lm-eval's tasks compare them: up to a stop text, without special tokens and thoughts."""
        if not self.thinks:
            return self._generate(requests)
        self.with_special = True
        try:
            answers = self._generate(requests)
        finally:
            self.with_special = False
        return [spoken(answer, request.args[0], self.tokenizer) for answer, request in zip(answers, requests, strict=True)]

    def write(self, requests: list[Any]) -> list[str]:
        """Return answers with their thoughts and the special tokens that may mark them, but without their end."""
        self.with_special = True
        try:
            return self._generate(requests)
        finally:
            self.with_special = False

    def _generate(self, requests: list[Any]) -> list[str]:
        self._begin(len(requests))
        self.stopped = 0
        self.batch_size_per_gpu = 1 if self.one_by_one else self.largest_batch
        asked = [(request.args[0], stops_apart(request.args[1])) for request in requests]
        instances = [Instance("generate_until", {}, (prompt, dict(options)), 0) for prompt, options in asked]
        answers: list[str] = super().generate_until(instances, disable_tqdm=True)
        self.batch_size_per_gpu = self.largest_batch
        return [self._cut(answer, options[STOPS], prompt) for answer, (prompt, options) in zip(answers, asked, strict=True)]

    def _cut(self, answer: str, stops: Iterable[str], prompt: str) -> str:
        return until(answer, stops, prompt, self.tokenizer) if self.with_special else cut(answer, stops)

    def check_generation(self, prompt: list[int]) -> None:
        """Generate answers one by one if padding changes them. Raises StageFailed if transformers cannot generate."""
        if not takes_cache(self.model):
            ids = torch.tensor([prompt], device=self.device)
            try:
                self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
            except Exception as error:  # a model's own code may raise anything
                message = f"transformers {transformers.__version__} cannot generate with `{self.model.config.model_type}`: {error}"
                raise StageFailed("config", message, "use another base model, or a runtime with a later transformers") from error
        self.one_by_one = padding_matters(self.model, prompt, self.tokenizer.pad_token_id)
        if self.one_by_one:
            self.events.warning("padding changes this model's answers, so they are generated one by one, which takes longer")

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        if self.with_special and skip_special_tokens:
            return written(tokens, self.tokenizer, self.ends)
        text: str = super().tok_decode(tokens, skip_special_tokens)
        return text

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._begin(len(requests))
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        fitting = LOGITS_BYTES // (2 * 4 * longest * self.model.config.vocab_size)
        self.batch_size_per_gpu = max(1, min(self.largest_batch, fitting))
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        self.batch_size_per_gpu = self.largest_batch
        self._advance(self.total - self.done)  # requests that share a context are scored together
        return scores

    def _begin(self, total: int) -> None:
        self.done, self.total = 0, total

    def _count_stopped(self, context: torch.Tensor, answers: torch.Tensor, stops: Sequence[str]) -> None:
        """Count the rows that contain an end token, with which shorter ones are padded, or a stop text."""
        ended = torch.isin(answers, torch.tensor(sorted(self.ends), device=answers.device)).any(dim=1)
        self.stopped += sum(
            whole or self._has_stop(prompt, ids, stops) for prompt, ids, whole in zip(context, answers, ended.tolist(), strict=True)
        )

    def _has_stop(self, prompt: torch.Tensor, ids: torch.Tensor, stops: Sequence[str]) -> bool:
        if not stops:
            return False
        answer = self.tok_decode(ids.tolist())
        return self._cut(answer, stops, self.tok_decode(prompt.tolist(), skip_special_tokens=False)) != answer

    def _advance(self, rows: int) -> None:
        if rows:
            self.done += rows
            self.events.progress(self.done, self.total, self.phase)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, attn_mask, labels)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Return token ids of contexts and answers, shape [batch, up to max_length]. `stop` is only the end token's text."""
        mask, stops = options["attention_mask"], options.pop(STOPS)
        plain = options.keys() <= {"attention_mask", "do_sample", "temperature"} and not options.get("do_sample")
        tokens = self._greedy(context, mask, max_length - context.shape[1], stops) if plain and takes_cache(self.model) else None
        if tokens is None:
            stop = stop if self.with_special else [*stops, *stop]  # lm-eval would also stop within thoughts
            tokens = super()._model_generate(context, max_length, stop, **options)
        self._count_stopped(context, tokens[:, context.shape[1] :], stops)
        self._advance(len(context))
        return tokens

    def _greedy(self, context: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, stops: Sequence[str]) -> torch.Tensor | None:
        """Return contexts, padded on the left, followed by their most likely continuations, padded with the end token. None for a model
        that does not return its states, such as RecurrentGemma."""
        answers = context.new_full((len(context), max_new_tokens), self.eot_token_id)
        rows = torch.arange(len(context), device=context.device)  # answers that have not ended
        ends = torch.tensor(sorted(self.ends), device=context.device)
        recent = max((len(stop.encode()) for stop in stops), default=0) + 1  # tokens that can hold the end of a stop text
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        tokens, cache = context, None
        last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}  # models with their own code may not
        for step in range(max_new_tokens):
            with torch.inference_mode():
                output = self.model(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
                )
            chosen, cache = output.logits[:, -1].argmax(-1), output.get("past_key_values")
            if cache is None:
                return None
            going = ~torch.isin(chosen, ends)
            answers[rows[going], step] = chosen[going]
            if stops:
                tails = self.tokenizer.batch_decode(answers[rows, max(0, step + 1 - recent) : step + 1])
                for place, tail in enumerate(tails):
                    if going[place] and any(stop in tail for stop in stops):
                        going[place] = not self._has_stop(context[rows[place]], answers[rows[place], : step + 1], stops)
            kept = going.nonzero()[:, 0]
            if len(kept) == 0:
                break
            if len(kept) < len(rows):
                cache.batch_select_indices(kept)
                rows, mask, positions, chosen = rows[kept], mask[kept], positions[kept], chosen[kept]
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        return torch.cat([context, answers], dim=1)


def stops_apart(options: dict[str, Any]) -> dict[str, Any]:
    """Return a request's options with its stop texts under STOPS: lm-eval would search them in thoughts as well."""
    given = options.get("until") or []
    stops = [given] if isinstance(given, str) else list(given)
    return {name: value for name, value in options.items() if name != "until"} | {STOPS: [stop for stop in stops if stop]}
