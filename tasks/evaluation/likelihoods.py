"""Scores given answers by the probability that a model finds for them: bits per byte, and which of two answers is more likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.data.masks import last_answer, prompt_and_answer
from tasks.data.rows import Row
from tuneline.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.evaluation.harness import LanguageModel


def bits_and_bytes(rows: Sequence[Row], lm: LanguageModel) -> dict[int, tuple[float, int]]:
    """Return for each row the bits that the model needs for the completion after its prompt, or for the text, and its UTF-8 bytes.

    Counts the tokens that training counts, except the end of turn, which is not part of the bytes. Text longer than the model's
    context is scored in windows, as in lm-eval.
    """
    requests, owners, sizes = to_score(rows, lm)
    bits = dict.fromkeys(sizes, 0.0)
    for i, (log_probability, _) in zip(owners, lm._loglikelihood_tokens(requests) if requests else [], strict=True):
        bits[i] -= log_probability / math.log(2)
    return {i: (bits[i], sizes[i]) for i in sizes}


def to_score(rows: Sequence[Row], lm: LanguageModel) -> tuple[list[tuple[None, list[int], list[int]]], list[int], dict[int, int]]:
    """Return lm-eval's requests (contexts and continuations as token ids), the row of each, and bytes by row."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    requests: list[tuple[None, list[int], list[int]]] = []
    owners: list[int] = []
    sizes: dict[int, int] = {}
    for i, row in enumerate(rows):
        text = row.text if row.text is not None else completion(row)
        if not text:
            continue
        if row.text is not None:
            ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            windows = list(map(make_disjoint_window, get_rolling_token_windows(ids, lm.prefix_token_id, lm.max_length, 1)))
        else:
            ids, start, end = last_answer(row, lm.tokenizer, lm.ends)
            if start == end:  # no part of it is rendered
                continue
            check_length(row, end, lm, "shorten the dataset's max_length")
            windows = [(ids[:start], ids[start:end])]
        requests += [(None, context, continuation) for context, continuation in windows]
        owners += [i] * len(windows)
        sizes[i] = len(text.encode())
    return requests, owners, sizes


def completion(row: Row) -> str | None:
    """Return the text of the row's last answer, if it is to be learned."""
    if row.label is False:
        return None
    prompt = row.prompt_messages()
    if row.messages is None or prompt is None:
        return row.completion
    last = row.messages[len(prompt)] if len(prompt) < len(row.messages) else {}
    return last["content"] if last and last.get("weight") != 0 else None


def check_length(row: Row, tokens: int, lm: LanguageModel, hint: str) -> None:
    """Raises StageFailed(config) if a row is too long: lm-eval would cut off the prompt's beginning."""
    if tokens > lm.max_length:
        raise StageFailed("config", f"row {row.id} and its answer: found {tokens} tokens, expected at most {lm.max_length}", hint)


# --- pairs -----------------------------------------------------------------------------------------------------------


def answers_to_compare(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[None, list[int], list[int]]], list[int]]:
    """Return lm-eval's requests (contexts and continuations as token ids), two of each pair, and the positions of the pairs."""
    pairs = [i for i, row in enumerate(rows) if row.rejected is not None]
    return [(None, *prompt_and_answer(each, tokenizer)) for i in pairs for each in rows[i].alternatives()], pairs


def preferences(rows: Sequence[Row], lm: LanguageModel) -> dict[int, dict[str, float]]:
    """Return for each pair whether the chosen answer has the higher log-probability, as a whole (`preference_accuracy`) and in the mean
    per token (`preference_accuracy_norm`): a sum favors short answers. Both count the tokens that training counts, with the end of
    turn."""
    requests, pairs = answers_to_compare(rows, lm.tokenizer)
    for position, (_, prompt, answer) in enumerate(requests):
        check_length(rows[pairs[position // 2]], len(prompt) + len(answer), lm, "shorten the dataset's max_length")
    sums = [log_probability for log_probability, _ in lm._loglikelihood_tokens(requests)] if requests else []
    means = [total / len(answer) for total, (_, _, answer) in zip(sums, requests, strict=True)]
    return {
        i: {
            "preference_accuracy": float(sums[2 * place] > sums[2 * place + 1]),
            "preference_accuracy_norm": float(means[2 * place] > means[2 * place + 1]),
        }
        for place, i in enumerate(pairs)
    }
