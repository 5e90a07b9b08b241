"""Runs lm-eval's model with vLLM: requests, stops and truncation of `tasks.evaluation.harness`, computed by `tasks.engine.client`.

lm-eval's Hugging Face model does everything else, so that both backends use the same token ids and truncate answers equally; for
that it holds the model's configuration, without weights. vLLM is started once the length of the longest request is known.

Left out: models that bring their own code, adapters of the output layer, and sampling parameters other than temperature and top_p.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from tasks.engine.client import BASE, OUTPUT, Adapters, Completion, Engine, Sampling, modules_of
from tasks.engine.server import Place
from tasks.evaluation.harness import STOPS, LanguageModel
from tasks.evaluation.sharing import Share
from tasks.models.loading import needs_remote_code, without_weights
from tuneline.errors import StageFailed
from tuneline.kinds.engine import EngineSettings
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.patches import patch
from tuneline.workspace.file_names import ENGINE_LOG
from tuneline.workspace.protocol import Events, Input, Request
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 1024  # requests sent together: vLLM makes its own batches
SENT_STOPS = 4  # stop texts that are sent to the server; answers are cut at all of them afterwards
NOT_FINITE = "Out of range float values"  # vLLM's message about values that are not finite
SUPPORTED_OPTIONS = {"attention_mask", "do_sample", "temperature", "top_p"}
FALLBACK_HINT = "set `backend: transformers`"


class EngineModel(LanguageModel):
    """Tokenizes from the beginning on; computes only within `serve`."""

    def __init__(self, source: Input, tokenizer: PreTrainedTokenizerBase, seed: int, events: Events):
        self.source, self.base = source, source.base or source
        if needs_remote_code(self.base):
            raise StageFailed("config", "tuneline does not run models with their own code in vLLM", FALLBACK_HINT)
        super().__init__(configured(model_folder(self.base.path)), tokenizer, BATCH_SIZE, seed, events, Share())
        self.short = math.inf  # in vLLM a row does not depend on the others
        patch(self, "_device", torch.device("cpu"))
        # lm-eval's windows are one token longer than this, and vLLM samples one more token after a scored sequence.
        patch(self, "_max_length", self.max_length - 2)
        self.name = BASE if source.type == "Model" else f"adapter-{source.digest[:16]}"
        self.engine: Engine

    @contextmanager
    def serve(self, request: Request, stage: EvaluateStage, longest: int) -> Iterator[None]:
        """Run vLLM within the context, with room for requests of `longest` tokens, at most the model's positions."""
        assert request.engine is not None
        settings, longest = stage.resources.engine or EngineSettings(), min(longest, self.max_length + 2)
        if settings.max_model_len is not None and settings.max_model_len < longest:
            message = f"resources.engine.max_model_len: found {settings.max_model_len}, expected {longest}, as in the longest request"
            raise StageFailed("config", message, "raise it, or remove it")
        adapters = None
        if self.source.type == "Adapter":
            config = json.loads((self.source.path / "adapter_config.json").read_bytes())
            if experts := [name for name in config.get("target_parameters") or () if not name.endswith(".weight")]:
                message = f"the adapter changes experts, which vLLM reads under other names: {experts[0]}"
                raise StageFailed("config", message, f"merge it and evaluate the model, or {FALLBACK_HINT}")
            modules = modules_of(self.source.path)
            adapters = Adapters(config["r"], sorted(modules) or None)
            if OUTPUT in modules:
                raise StageFailed("config", f"the adapter changes {OUTPUT}, with which vLLM cannot score", FALLBACK_HINT)
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if stage.resources.gpus else None
        log = request.work / ENGINE_LOG
        engine = Engine(Place(request.engine, log, gpus), model_folder(self.base.path), settings, stage.dtype, longest, adapters)
        began = time.monotonic()
        print(f"starting vLLM: its log is {log}", flush=True)
        try:
            with engine:
                print(f"vLLM is ready after {time.monotonic() - began:.0f} s", flush=True)
                if self.source.type == "Adapter":
                    engine.load(self.name, self.source.path)
                self.engine = engine
                yield
        finally:
            shutil.copy(log, request.meta / ENGINE_LOG)

    def check(self, prompt: list[int]) -> None:
        """Raises StageFailed(bug) if, on a real prompt, log-probabilities are not finite, or the adapter changes none."""
        sequence = [*prompt, self.eot_token_id][: self.engine.max_model_len - 1]
        try:
            scores = {name: self.engine.score([sequence], name)[0].logprobs for name in (self.name, BASE)}
        except StageFailed as error:
            if NOT_FINITE not in error.message:
                raise
            hint = "the training diverged, or the weights overflow their type"
            raise StageFailed("bug", "the model's log-probabilities are not finite", hint) from error
        if self.name != BASE and scores[self.name] == scores[BASE]:
            hint = "it was not trained, or was not loaded: check the loss of its training"
            raise StageFailed("bug", "the adapter changes nothing: log-probabilities with and without it are the same", hint)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._begin(len(requests))
        found = []
        for start in range(0, len(requests), BATCH_SIZE):
            batch = [(continuation, context + continuation) for _, context, continuation in requests[start : start + BATCH_SIZE]]
            scores = self.engine.score([whole[-(self.max_length + 1) :] for _, whole in batch], self.name)
            for (continuation, _), score in zip(batch, scores, strict=True):
                assert 0 < len(continuation) <= self.max_length
                found.append((sum(score.logprobs[-len(continuation) :]), all(score.greedy[-len(continuation) :])))
            self._advance(len(batch))
        return found

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Return token ids of contexts and answers, [batch, max_length]; contexts padded on the left, answers with the end token."""
        stops = options.pop(STOPS)
        if more := sorted(options.keys() - SUPPORTED_OPTIONS):
            raise StageFailed(
                "config", f"a benchmark generates with {', '.join(more)}, which tuneline does not pass to vLLM", FALLBACK_HINT
            )
        before, length = self.done, max_length - context.shape[1]
        prompts = [row[kept.bool()].tolist() for row, kept in zip(context, options["attention_mask"], strict=True)]
        seeds = range(self.seed + before, self.seed + before + len(prompts))

        def generate(wanted: list[int], stop: list[str]) -> list[Completion]:
            sampling = Sampling(
                max_tokens=length,
                temperature=options.get("temperature", 0.0),  # lm-eval's default, also for `do_sample: false`
                top_p=options.get("top_p", 1.0),
                stop_token_ids=sorted(self.ends),
                stop=stop,
            )
            return self.engine.generate(
                [prompts[i] for i in wanted],
                sampling,
                model=self.name,
                seed=[seeds[i] for i in wanted],
                done=lambda finished, _: self._advance(max(0, before + finished - self.done)),
            )

        completions = generate(list(range(len(prompts))), stops[:SENT_STOPS])
        # The server also stops within thoughts: such answers are written again, to their end.
        again = [i for i, completion in enumerate(completions) if self._broken_off(context[i], completion.ids, length, stops)]
        for i, completion in zip(again, generate(again, []) if again else [], strict=True):
            completions[i] = completion
        answers = context.new_full((len(context), length), self.eot_token_id)
        for row, completion in zip(answers, completions, strict=True):
            ids = [token for token in completion.ids if token not in self.ends]  # an end token can only be the last
            row[: len(ids)] = torch.tensor(ids)
        self._count_stopped(context, answers, stops)
        return torch.cat([context, answers], dim=1)

    def _broken_off(self, prompt: torch.Tensor, ids: list[int], length: int, stops: list[str]) -> bool:
        """Return whether an answer ends neither with an end token, nor at its maximum length, nor at a stop text after its thoughts."""
        ended = len(ids) == length or (ids and ids[-1] in self.ends)
        return not ended and bool(stops) and not self._has_stop(prompt, torch.tensor(ids), stops)


def configured(folder: Path) -> PreTrainedModel:
    """Build the model with what lm-eval needs: its configuration and its end tokens."""
    model = without_weights(folder)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
