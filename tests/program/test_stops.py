"""Where evaluations cut answers: at stop texts after the thoughts, of datasets and of lm-eval's benchmarks."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from evaluate_tools import own_benchmarks, request_for, samples
from pico import save_pico, teach, tokenizer
from program_tools import run_program
from template_table import said, with_markers
from template_tools import ASK, CHANNELED, OPENS, THINKING, TURN

from tasks.data.rows import Row
from tasks.data.thoughts import cut, spoken, until
from tasks.models.loading import template_hash
from tuneline.workspace.protocol import Input

THOUGHT = "<think>\nHm. Is it?\n\nWell.\n</think>\n\n"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Input:
    """A model that thinks in several sentences before each answer, and goes on after it."""
    folder = save_pico(tmp_path_factory.mktemp("thinking") / "model", tied=False)
    asked = [[said("user", f"Is {i} even?"), said("assistant", f"{THOUGHT}{'no' if i % 2 else 'yes'}. More.")] for i in range(8)]
    teach(folder, asked, template=THINKING)
    words = tokenizer()
    words.chat_template = THINKING
    return Input(path=folder, digest="b" * 64, type="Model", template=template_hash(words))


def rows() -> list[Row]:
    return [
        Row("s", messages=(said("user", f"Is {i} even?"), said("assistant", "no" if i % 2 else "yes")), id=str(i), group=str(i))
        for i in range(8)
    ]


def test_thoughts_are_no_part_of_what_a_benchmark_compares_and_do_not_end_an_answer(thinking: Input, tmp_path: Path) -> None:
    files = own_benchmarks(tmp_path / "own")
    task = tmp_path / "own" / "said.yaml"
    task.write_text(task.read_text().replace("until: ['.'], max_gen_toks: 5", "until: ['.', \"\\n\\n\"], max_gen_toks: 40"))
    fields: dict[str, Any] = {"files": files, "include_path": "own", "benchmarks": ["said"]}
    request = request_for(tmp_path / "run", thinking, **fields)
    result, _ = run_program(request)
    assert result.metrics["said/exact_match@first"] == 1.0, samples(request)
    task.write_text(task.read_text().replace("do_sample: false", "do_sample: true, temperature: 0.01"))
    result, _ = run_program(request_for(tmp_path / "sampled", thinking, **fields))
    assert result.metrics["said/exact_match@first"] == 1.0


def test_a_datasets_answers_are_cut_at_its_stop_texts(thinking: Input, tmp_path: Path) -> None:
    def scored(name: str, **fields: Any) -> tuple[dict[str, float], list[str]]:
        request = request_for(tmp_path / name, thinking, rows(), **{"max_new_tokens": 40, **fields})
        result, _ = run_program(request)
        return result.metrics, [sample["answer"] for sample in samples(request)]

    metrics, answers = scored("whole")
    assert (metrics["dataset0/exact_match"], metrics["dataset0/stopped"]) == (0.0, 1.0)
    assert answers[0] == f"{THOUGHT}yes. More."
    metrics, answers = scored("cut", stop=["?", ".", "\n"])
    assert (metrics["dataset0/exact_match"], metrics["dataset0/stopped"]) == (1.0, 1.0)
    assert answers == [f"{THOUGHT}{'no' if i % 2 else 'yes'}" for i in range(8)]
    metrics, answers = scored("within", stop=["."], max_new_tokens=10)
    assert (metrics["dataset0/exact_match"], metrics["dataset0/stopped"]) == (0.0, 0.0)
    assert all(answer.startswith("<think>") and "</think>" not in answer for answer in answers)


def test_a_stop_text_ends_each_answer_of_a_batch_at_its_own_step(base: Input, tmp_path: Path) -> None:
    """As the last of several tokens, within one, and in none of some answers."""
    asked = [Row("s", messages=(said("user", f"{'Is it ' * i}?"),), answer="x", id=str(i), group=str(i)) for i in range(8)]
    whole = request_for(tmp_path / "whole", base, asked, max_new_tokens=24)
    run_program(whole)
    texts = [sample["answer"] for sample in samples(whole)]
    stops = [texts[0][3:5], texts[1][-2:], texts[2][9:14]]
    expected = [cut(text, stops) for text in texts]
    assert len({len(text) for text in expected}) > 2
    for size in (1, 8):
        request = request_for(tmp_path / f"cut{size}", base, asked, max_new_tokens=24, stop=stops, resources={"micro_batch_size": size})
        result, _ = run_program(request)
        assert [sample["answer"] for sample in samples(request)] == expected
        assert result.metrics["dataset0/stopped"] >= mean(a != b for a, b in zip(expected, texts, strict=True)) > 0


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "expected"),
    [
        (THINKING, "", "A\nB", "A"),
        (THINKING, "", "\n<think>a\nb</think>\n\nA\nB", "A"),
        (THINKING, "", "\n<think>a\nb", ""),
        (THINKING, "", "\n\n", "\n\n"),  # nothing yet
        (THINKING, "", "    return 1\n", "    return 1"),  # goes on after a given beginning
        (OPENS, "<think>\n", "a\nb</think>\n\nA\nB", "A"),
        (OPENS, "<think>\n", "a\nb", ""),
        (OPENS, "", "A\nB", "A"),
        (CHANNELED, "", "<file_sep>analysis<repo_name>a\nb<gh_stars><|im_start|>assistant<file_sep>final<repo_name>A\nB", "A"),
        (TURN + ASK, "", "<think>a\nb</think>\nA\nB", "A"),  # a template that knows nothing of thoughts
        (TURN + ASK, "", "<think>a\nb", ""),
        (TURN + ASK, "", "\nA", ""),
    ],
)
def test_stops_are_searched_after_thoughts(template: str, prompt: str, answer: str, expected: str) -> None:
    by = with_markers(tokenizer())
    by.chat_template = template
    kept = until(answer, ["\n"], prompt, by)
    assert answer.startswith(kept)
    assert spoken(kept, prompt, by) == expected
