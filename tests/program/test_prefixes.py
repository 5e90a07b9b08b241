"""The common beginning of a batch's rows is computed once: scores and answers stay those of lm-eval and of each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from pico import save_pico, tokenizer
from transformers import AutoModelForCausalLM

from tasks.evaluation import prefixes
from tasks.evaluation.harness import LanguageModel
from tasks.evaluation.sharing import Share
from tuneline.workspace.protocol import Events

BEGINNING = "Answer each question in one word, after you have read it twice, and never in two or three words, please. "
QUESTIONS = ["Is it?", "Where are the keys and the hats of Ann?", "Who", "Is it late, or is it early in the day?", "What is it?"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("prefixes")
    model = AutoModelForCausalLM.from_pretrained(save_pico(folder / "model")).eval()
    made = LanguageModel(model, tokenizer(), 3, 0, Events(folder / "events.jsonl"), Share())
    made.check_generation(tokenizer()(BEGINNING)["input_ids"])
    assert made.shares_beginnings
    return made


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The tokens and the rows of each beginning that is computed once."""
    found: list[tuple[int, int]] = []
    real = prefixes.begin

    def begin(model: Any, tokens: Any, rows: int) -> Any:
        found.append((len(tokens), rows))
        return real(model, tokens, rows)

    monkeypatch.setattr(prefixes, "begin", begin)
    return found


def test_scores_are_those_of_lm_eval(lm: LanguageModel, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them: answers of one token that share a sequence, one of many tokens, a row too long for the model."""
    monkeypatch.setattr(lm, "_max_length", 100)
    words, most = lm.tokenizer, lm.max_length
    contexts = [words(BEGINNING + question)["input_ids"] for question in QUESTIONS]
    answers = [words(text)["input_ids"] for text in (" yes", " no", " in the hall of the house by the river")]
    requests: list[Any] = [(None, context, answer) for context in contexts for answer in answers]
    requests.append((None, contexts[0] * (most // len(contexts[0]) + 1), answers[2]))
    found = lm._loglikelihood_tokens(requests)
    plain = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in plain]
    assert torch.allclose(torch.tensor([score for score, _ in found]), torch.tensor([score for score, _ in plain]), rtol=1e-5)
    shared = len(words(BEGINNING.rstrip())["input_ids"])
    assert begun
    assert all(tokens >= shared and rows > 1 for tokens, rows in begun)


def test_answers_are_those_of_whole_prompts(lm: LanguageModel, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"do_sample": False, "max_gen_toks": 12, "until": []}
    requests = [Instance("generate_until", {}, (BEGINNING + question, dict(options)), 0) for question in QUESTIONS]
    found = lm.write(requests)
    assert [rows for _, rows in begun] == [3, 2]
    monkeypatch.setattr(lm, "shares_beginnings", False)
    assert lm.write(requests) == found
    assert len(begun) == 2


def test_what_sequences_share() -> None:
    first = list(range(40))
    assert prefixes.common([[*first, 1], [*first, 2, 3], [*first, 2]], 99) == 40
    assert prefixes.common([[*first, 1], [*first, 2]], 30) == 30
    assert prefixes.common([first, [*first, 2]], 99) == 40
    assert prefixes.common([[*first[: prefixes.SHORTEST - 1], 99], first], 99) == 0  # too short to be worth it
    assert prefixes.common([first], 99) == 0
