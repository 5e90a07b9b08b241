"""Extends lm-eval's Hugging Face model: it reports progress, limits memory, stops where answers end, and shares batches among processes.

Imported only by programs that score a model: torch and lm-eval take seconds to import. lm-eval's own tasks and ours call the same two
methods, `generate_until` and `_loglikelihood_tokens`. Both sort requests by length, longest first, and batch them; each batch is then
one call of lm-eval's method, in any of the processes (`tasks.evaluation.sharing`; lm-eval's own way needs accelerate, and gives each
process other batches).

Greedy generation is implemented here: transformers computes rows that have ended until the last row of a batch ends; here a row
leaves the batch with its end token or stop text. Sampling is left to transformers. Stop texts are searched only after an answer's
thoughts: lm-eval would cut a model that thinks at the first line end of its thoughts. Log-probabilities are implemented here as well:
lm-eval computes logits of whole sequences. What rows of a batch begin with is computed once (`tasks.evaluation.prefixes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig

from tasks.data.rendering import ends
from tasks.data.thoughts import cut, marks, spoken, until, written
from tasks.evaluation import prefixes
from tasks.evaluation.sharing import Batch, Share, batches_to_score, batches_to_write
from tasks.models.padding import padding_matters, switches_at, takes_cache
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPS = "stops"  # option of a request, in place of lm-eval's `until`
LOGITS_BYTES = 2**31  # limit of one batch's logits and log-probabilities, in float32


class LanguageModel(HFLM):
    one_by_one = False
    """Whether answers are generated one row at a time."""
    shares_beginnings = False
    """Whether what rows of a batch begin with is computed once."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int, events: Events, share: Share
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.events, self.largest_batch, self.phase = events, batch_size, ""
        self.share, self.seed, self.batch = share, seed, 0
        self.done = self.total = self.stopped = 0
        self.with_special = False
        self.short = switches_at(model)
        """The most tokens of a sequence that may share a batch with others."""
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
        asked = [(request.args[0], stops_apart(request.args[1])) for request in requests]
        lengths = [len(self.tok_encode(prompt)) for prompt, _ in asked]
        most = max(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"] for _, options in asked)
        size = 1 if self.one_by_one or max(lengths) + most > self.short else self.largest_batch

        def write(number: int, batch: Batch) -> list[tuple[str, int]]:
            self.stopped, self.batch = 0, number
            instances = [Instance("generate_until", {}, (asked[i][0], dict(asked[i][1])), 0) for i in batch]
            answers: list[str] = super(LanguageModel, self).generate_until(instances, disable_tqdm=True)
            return [(answer, 0 if place else self.stopped) for place, answer in enumerate(answers)]

        found = self.share.compute(batches_to_write(asked, lengths, size), write)
        self._end()
        self.stopped = sum(stopped for _, stopped in found)
        return [self._cut(answer, options[STOPS], prompt) for (answer, _), (prompt, options) in zip(found, asked, strict=True)]

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
        self.shares_beginnings = not self.one_by_one and prefixes.suits(self.model, prompt, self.tokenizer.pad_token_id)
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
        size = max(1, min(self.largest_batch, fitting)) if longest <= self.short else 1

        def score(number: int, batch: Batch) -> list[tuple[float, bool]]:
            scores = self._score([requests[i][1:] for i in batch])
            self._advance(len(batch))
            return scores

        found = self.share.compute(batches_to_score(requests, size), score)
        self._end()
        return [(log_probability, greedy) for log_probability, greedy in found]

    def _score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, and whether greedy decoding would give it. Requests that
        differ only in their last token are one sequence."""
        whole = [tuple(context + continuation[:-1]) for context, continuation in requests]
        places = {tokens: place for place, tokens in enumerate(dict.fromkeys(whole))}
        sequences, rows = [list(tokens[-self.max_length :]) for tokens in places], [places[tokens] for tokens in whole]
        starts = list(map(len, sequences))  # of what is scored of each sequence
        for row, (_, continuation) in zip(rows, requests, strict=True):
            starts[row] = min(starts[row], len(sequences[row]) - len(continuation))
        begun, beginning_of = prefixes.beginnings(sequences, starts, self.max_length) if self.shares_beginnings else ([], [])
        skipped = [len(begun[i]) for i in beginning_of] or [0] * len(sequences)
        rests = [tokens[skip:] for tokens, skip in zip(sequences, skipped, strict=True)]
        width, first = max(map(len, rests)), min(start - skip for start, skip in zip(starts, skipped, strict=True))
        tokens = torch.tensor([rest + [0] * (width - len(rest)) for rest in rests], device=self.device)
        options: dict[str, Any] = {"logits_to_keep": width - first} if self.model._supports_logits_to_keep() else {}
        if begun:
            options["past_key_values"], mask = prefixes.begin(self.model, begun, beginning_of)
            options["attention_mask"] = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            options["position_ids"] = torch.tensor(skipped, device=self.device)[:, None] + torch.arange(width, device=self.device)
        with torch.inference_mode():
            logits = self.model(input_ids=tokens, **options).logits[:, first - width :]
            log_probabilities = logits.log_softmax(-1, dtype=torch.float32)  # a sum of -300 in bfloat16 is rounded to multiples of 2
        found = []
        for row, (_, continuation) in zip(rows, requests, strict=True):
            end = len(rests[row]) - first
            part, wanted = log_probabilities[row, end - len(continuation) : end], torch.tensor(continuation, device=self.device)
            found.append((float(part.gather(1, wanted[:, None]).sum()), bool((part.argmax(-1) == wanted).all())))
        return found

    def _begin(self, total: int) -> None:
        self.share.begin()
        self.done, self.total = 0, total

    def _end(self) -> None:
        """Report the rows that other processes have computed in the meantime."""
        if self.done < self.total:
            self.events.progress(self.total, self.total, self.phase)

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
            self.done = self.share.add(rows)
            self.events.progress(self.done, self.total, self.phase)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Return token ids of contexts and answers, shape [batch, up to max_length]. `stop` is only the end token's text."""
        mask, stops = options["attention_mask"], options.pop(STOPS)
        plain = options.keys() <= {"attention_mask", "do_sample", "temperature"} and not options.get("do_sample")
        plain = plain and max_length <= self.short  # transformers begins again where the frequencies change
        tokens = self._greedy(context, mask, max_length - context.shape[1], stops) if plain and takes_cache(self.model) else None
        if tokens is None:
            stop = stop if self.with_special else [*stops, *stop]  # lm-eval would also stop within thoughts
            torch.manual_seed(self.seed + self.batch)  # samples must not depend on the batches that this process had before
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
        tokens, cache, shared = context, None, 0
        prompts = [row[kept.bool()].tolist() for row, kept in zip(context, mask, strict=True)]
        if self.shares_beginnings and (shared := prefixes.common(prompts, min(map(len, prompts)) - 1)):
            cache, _ = prefixes.begin(self.model, [prompts[0][:shared]], [0] * len(prompts))
            # The rest is padded after the beginning instead of before it.
            parts = [(row[: -len(ids)], row[shared - len(ids) :]) for row, ids in zip(context, prompts, strict=True)]
            tokens = torch.stack([torch.cat(part) for part in parts])
            mask = torch.cat([mask.new_ones(len(rows), shared), mask[:, : mask.shape[1] - shared]], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
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
