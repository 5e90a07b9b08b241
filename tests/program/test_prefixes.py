"""What rows of a batch begin with is computed once: scores and answers stay those of lm-eval and of each row alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_table import save
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
    """How many beginnings are computed, and for how many rows of a batch."""
    found: list[tuple[int, int]] = []
    real = prefixes.begin

    def begin(model: Any, begun: Any, rows: Any) -> Any:
        found.append((len(begun), len(rows)))
        return real(model, begun, rows)

    monkeypatch.setattr(prefixes, "begin", begin)
    return found


@pytest.mark.parametrize(("all_alike", "beginnings"), [(True, (1, 3)), (False, (2, 3))], ids=["common", "of each question"])
def test_scores_are_those_of_lm_eval(
    lm: LanguageModel, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, all_alike: bool, beginnings: tuple[int, int]
) -> None:
    """Among them: answers of one token that share a sequence, also with a shorter context; one of many tokens; a row too long for the
    model."""
    monkeypatch.setattr(lm, "_max_length", 100)
    words, most = lm.tokenizer, lm.max_length
    contexts = [words(BEGINNING + question if all_alike else f"{question} {BEGINNING}")["input_ids"] for question in QUESTIONS]
    answers = [words(text)["input_ids"] for text in (" yes", " no", " in the hall of the house by the river")]
    requests: list[Any] = [(None, context, answer) for context in contexts for answer in answers]
    requests.append((None, contexts[0][:-2], contexts[0][-2:] + answers[0]))
    requests.append((None, contexts[0] * (most // len(contexts[0]) + 1), answers[2]))
    found = lm._loglikelihood_tokens(requests)
    # One by one: lm-eval 0.4.13 confuses requests that share a sequence but not a context.
    plain = [HFLM._loglikelihood_tokens(lm, [request], disable_tqdm=True)[0] for request in requests]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in plain]
    assert torch.allclose(torch.tensor([score for score, _ in found]), torch.tensor([score for score, _ in plain]), rtol=1e-5)
    assert beginnings in begun


def test_answers_are_those_of_whole_prompts(lm: LanguageModel, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"do_sample": False, "max_gen_toks": 12, "until": []}
    requests = [Instance("generate_until", {}, (BEGINNING + question, dict(options)), 0) for question in QUESTIONS]
    found = lm.write(requests)
    assert begun == [(1, 3), (1, 2)]
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


def test_what_is_computed_before() -> None:
    """Contexts, if more of their tokens recur than of what all share."""
    one, other = list(range(40)), [*range(20), *range(50, 60)]
    assert prefixes.beginnings([[*one, 1], [*one, 2], [*other, 1]], [40, 40, 30], 99) == ([one[:20]], [0, 0, 0])
    assert prefixes.beginnings([[*one, 1], [*one, 2], [*one[1:], 1]], [40, 40, 39], 99) == ([one, one[1:]], [0, 0, 1])
    assert prefixes.beginnings([[1, 2], [1, 3]], [1, 1], 99) == ([], [])
    assert prefixes.beginnings([[*one, 1], [*one, 2]], [0, 40], 99) == ([], [])  # no context to compute before
    long, short = list(range(50)), list(range(60, 80))  # a context of 50 tokens and an answer of 30 have more positions than 70
    pairs = [[*long, 1], [*long, 2], [*long, 3], [*short, *range(30)], [*short, *range(1, 31)]]
    assert prefixes.beginnings(pairs, [50, 50, 50, 20, 20], 80) == ([long, short], [0, 0, 0, 1, 1])
    assert prefixes.beginnings(pairs, [50, 50, 50, 20, 20], 70) == ([], [])


def test_scores_in_bfloat16_are_not_rounded(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of -300 in bfloat16 is a multiple of 2: which of two answers is more likely would be lost."""
    model = copy.deepcopy(lm.model).to(torch.bfloat16)
    monkeypatch.setattr(lm, "_model", model)
    context = lm.tokenizer(BEGINNING)["input_ids"]
    answer = context * 2
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].float()
    expected = float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    ((found, _),) = lm._loglikelihood_tokens([(None, context, answer)])  # type: ignore[list-item]
    assert found == pytest.approx(expected, abs=0.05)


def test_rows_near_the_models_length(tmp_path: Path) -> None:
    """A long context with short answers beside a short one with long answers: padded, they are longer than the model's positions."""
    save(tmp_path / "model", "gpt2", max_position_embeddings=128)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    lm = LanguageModel(model, tokenizer(), 8, 0, Events(tmp_path / "events.jsonl"), Share())
    lm.shares_beginnings = True
    long, short = list(range(100, 220)), list(range(100, 130))
    requests: list[Any] = [(None, long, [i, 7]) for i in range(40, 44)] + [(None, short, list(range(i, i + 70))) for i in range(40, 43)]
    found = [score for score, _ in lm._loglikelihood_tokens(requests)]
    alone = [lm._loglikelihood_tokens([request])[0][0] for request in requests]
    assert found == pytest.approx(alone, rel=1e-5)
