"""Writes one answer, token by token, as an evaluation would: the same prompt, the same end tokens and stop texts.

transformers generates; of the model's generation_config.json only the end tokens are used, as in `tasks.evaluation.harness`. An answer
has no batch, so a greedy one equals the evaluation's, except where two tokens are equally likely up to rounding.

Left out: the engine vLLM, which `tasks.serving.server` runs, and calls of tools: the model's call is shown as it wrote it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from tasks.data.masks import prompt_ids
from tasks.data.rendering import ends, prompt_text
from tasks.data.rows import Row
from tasks.data.thoughts import after_thoughts, marks, said, until, without_special, written
from tasks.models.loading import compute_type, load_model, load_tokenizer
from tuneline.errors import StageFailed
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.workspace.protocol import Request
from tuneline.workspace.sampling import Sampling

if TYPE_CHECKING:
    import torch

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
UNCLOSED = re.compile(r"[<\[][^<>\[\]\s]{0,20}")  # at the beginning of an answer: it may become a mark of thoughts


@dataclass(frozen=True)
class Answer:
    """`answer` has thoughts and special tokens, but not its end; `said` is what remains without them."""

    answer: str
    said: str
    ended: Literal["stop", "length", "interrupted"]
    tokens: int
    seconds: float
    first_token: float
    """Seconds until the first token."""


class Writer:
    """A loaded model. `stopped`: set by another thread to end the current answer."""

    def __init__(self, request: Request):
        from transformers import GenerationConfig

        stage, source = request.stage(), request.inputs["model"]
        assert isinstance(stage, EvaluateStage)
        self.tokenizer = load_tokenizer(source)
        # With several GPUs, as many as the evaluation's, the layers are spread over them.
        self.model = load_model(source, compute_type(stage), "balanced" if stage.resources.gpus > 1 else None)
        self.ends = set(ends(self.tokenizer, self.model.generation_config.eos_token_id))
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends), pad_token_id=self.tokenizer.pad_token_id)
        self.room: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.stopped = Event()

    def write(self, row: Row, settings: Sampling, show: Callable[[str, bool], None]) -> Answer:
        """Answer the row's prompt. `show` gets each piece of text as soon as it is certain, and whether it is a thought."""
        import torch
        from transformers import StoppingCriteriaList

        began, prompt, ids = time.monotonic(), prompt_text(row, self.tokenizer), prompt_ids(row, self.tokenizer)
        length = settings.max_new_tokens if self.room is None else min(settings.max_new_tokens, self.room - len(ids))
        if not ids or length < 1:
            found = f"found {len(ids)} tokens before the answer, expected 1 to {(self.room or 2) - 1}"
            raise StageFailed("data", found, "ask less, or begin a new conversation with `/reset`")
        progress = _Progress(self, prompt, len(ids), settings, show)
        sampled: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        given = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=length, do_sample=bool(sampled),
                stopping_criteria=StoppingCriteriaList([progress]), **sampled,
            )  # fmt: skip
        new = output[0, len(ids) :].tolist()
        whole = written(new, self.tokenizer, self.ends)
        answer = until(whole, settings.stop, prompt, self.tokenizer)
        progress.finish(answer)
        ended: Literal["stop", "length", "interrupted"] = "stop"
        if new[-1] not in self.ends and answer == whole:
            ended = "interrupted" if self.stopped.is_set() else "length"
        spent = time.monotonic() - began
        return Answer(answer, said(answer, prompt, self.tokenizer), ended, len(new), round(spent, 3), round(progress.first - began, 3))


class _Progress:
    """A stopping criterion of transformers: called after each token, shows new text and ends the answer at a stop text."""

    def __init__(self, writer: Writer, prompt: str, start: int, settings: Sampling, show: Callable[[str, bool], None]):
        self.writer, self.prompt, self.start, self.settings, self.show = writer, prompt, start, settings, show
        self.shown = ""
        self.first = 0.0

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        import torch

        self.first = self.first or time.monotonic()
        text = written(ids[0, self.start :].tolist(), self.writer.tokenizer, self.writer.ends)
        cut = until(text, self.settings.stop, self.prompt, self.writer.tokenizer)
        self._show(cut if cut != text else text[: len(text) - self._uncertain(text)])
        return torch.tensor([cut != text or self.writer.stopped.is_set()], device=ids.device)

    def finish(self, answer: str) -> None:
        self._show(answer)

    def _show(self, text: str) -> None:
        if text.startswith(self.shown):
            begin, shown = len(text) - len(after_thoughts(text, self.prompt, self.writer.tokenizer)), len(self.shown)
            for new, thoughts in ((text[shown:begin], True), (text[max(shown, begin) :], False)):
                if visible := without_special(new, self.writer.tokenizer):
                    self.show(visible, thoughts)
            self.shown = text

    def _uncertain(self, text: str) -> int:
        """Count the last characters that may still change: an unfinished one, or the beginning of a stop text or of thoughts."""
        found, begun = marks(self.writer.tokenizer), text.strip()
        if begun and (UNCLOSED.fullmatch(begun) or any(mark.startswith(begun) for mark in (found.start, *found.leads))):
            return len(text)
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        stops = (n for stop in self.settings.stop for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
        return max(unfinished, max(stops, default=0))
