"""Gates: each condition, met and not met, with its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.kinds.gate import GateStage
from tuneline.kinds.merge import MergeStage
from tuneline.planning.verdict import judge, shown_metrics
from tuneline.workspace.artifact import Manifest

METRICS = {"a": {"m": 0.7, "m_stderr": 0.01}, "b": {"m": 0.4}, "c": {"other": 1.0}}
MERGES = dict.fromkeys(METRICS, MergeStage(kind="merge", adapters=("x",)))

CASES = [
    ({"at_least": 0.7}, True, "met: m of a is 0.7, required at least 0.7"),
    ({"at_least": 0.71}, False, "NOT met: m of a is 0.7, required at least 0.71"),
    ({"at_most": 0.6}, False, "NOT met: m of a is 0.7, required at most 0.6"),
    ({"improves_on": "b", "by": 0.3}, True, "met: m of a is 0.7, required at least 0.3 over b's 0.4 (is +0.3)"),
    ({"improves_on": "b", "by": 0.31}, False, "NOT met: m of a is 0.7, required at least 0.31 over b's 0.4 (is +0.3)"),
    ({"not_below": "b"}, True, "met: m of a is 0.7, required not below b's 0.4 less 0 (is +0.3)"),
    ({"of": "b", "not_below": "a", "tolerance": 0.1}, False, "NOT met: m of b is 0.4, required not below a's 0.7 less 0.1 (is -0.3)"),
    ({"of": "b", "not_below": "a", "tolerance": 0.3}, True, "met: m of b is 0.4, required not below a's 0.7 less 0.3 (is -0.3)"),
    ({"metric": "n", "at_least": 0}, False, "NOT met: a has no metric n; it has m"),
    ({"not_below": "c"}, False, "NOT met: c has no metric m; it has other"),
]


def manifest(info: dict[str, Any] | None = None, /, **metrics: float) -> Manifest:
    return Manifest(
        kind="x", type="Report", key="k", document={}, digest="d", files=(), parents={}, metrics=metrics, info=info or {}, host={}
    )


@pytest.mark.parametrize(("condition", "passes", "line"), CASES, ids=[line for _, _, line in CASES])
def test_a_requirement_is_judged_with_its_figures(condition: dict[str, Any], passes: bool, line: str) -> None:
    gate = GateStage.model_validate({"kind": "gate", "require": [{"metric": "m", "of": "a", **condition}]})
    assert judge(gate, MERGES, {name: manifest(**metrics) for name, metrics in METRICS.items()}) == (passes, [line])


def test_one_refusal_is_enough() -> None:
    gate = GateStage.model_validate({"kind": "gate", "require": [{"metric": "m", "of": "a", "at_least": bound} for bound in (0, 1)]})
    passed, lines = judge(gate, MERGES, {"a": manifest(m=0.7)})
    assert not passed
    assert [line[:3] for line in lines] == ["met", "NOT"]


def test_datasets_go_by_their_stages_names() -> None:
    stage = EvaluateStage.model_validate({"kind": "evaluate", "model": "m", "datasets": ["sums", "words"], "benchmarks": ["arc"]})
    metrics = {"dataset0/em": 1.0, "dataset1/em": 2.0, "arc/acc": 3.0}
    assert shown_metrics(stage, metrics) == {"sums/em": 1.0, "words/em": 2.0, "arc/acc": 3.0}


# --- what two evaluations must have in common -------------------------------------------------------------------------

FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base: {{kind: model, path: model}}
      rows: {{kind: dataset, sources: [{{type: files, path: a.jsonl}}]}}
      sft:  {{kind: sft, model: base, dataset: rows}}
      old:  {{kind: evaluate, model: base, datasets: [rows], benchmarks: [arc], {old}}}
      new:  {{kind: evaluate, model: sft, datasets: [rows], benchmarks: [arc], {new}}}
      gate: {{kind: gate, require: [{{metric: {metric}, of: new, {condition}: old}}]}}
"""
REFUSED = [
    ("arc/acc", "limit: 10", "limit: 20", "limit", "10", "20"),
    ("rows/exact_match", "seed: 0", "limit: 20", "limit", "nothing", "20"),
    ("rows/bits_per_byte", "limit: 10", "limit: 20", "limit", "10", "20"),
    ("rows/exact_match", "max_new_tokens: 8", "max_new_tokens: 9", "max_new_tokens", "8", "9"),
    ("arc/acc", "num_fewshot: 5", "num_fewshot: 0", "num_fewshot", "5", "0"),
    ("arc/acc", "include_path: mine", "limit: null", "include_path", "'mine'", "nothing"),
    ("arc/acc", "num_fewshot: 5, seed: 1", "num_fewshot: 5", "seed", "1", "0"),
]


@pytest.mark.parametrize("condition", ["improves_on", "not_below"])
@pytest.mark.parametrize(("metric", "old", "new", "field", "found", "against"), REFUSED)
def test_evaluations_that_asked_otherwise_are_not_compared(
    tmp_path: Path, metric: str, old: str, new: str, field: str, found: str, against: str, condition: str
) -> None:
    (tmp_path / "p.yaml").write_text(FILE.format(metric=metric, old=old, new=new, condition=condition))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "p.yaml")
    assert str(caught.value).partition(": ")[2] == (
        f"demo.gate.require.0.{condition}: found `old` with {field} {found}, `new` with {against}, expected the same "
        f"{field}: otherwise they answer different questions\n\nhint: set the same {field} in both"
    )
    assert f":{10}:" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "compared", "message"),
    [
        ("rows/exactmatch", "old", "found `rows/exactmatch`, expected one of the metrics of a dataset: exact_match, answer_recall, score, stopped, bits_per_byte, preference_accuracy, preference_accuracy_norm\n\nhint: did you mean `exact_match`?"),
        ("rows/perplexity", "old", "found `rows/perplexity`, expected one of the metrics of a dataset: exact_match, answer_recall, score, stopped, bits_per_byte, preference_accuracy, preference_accuracy_norm\n\nhint: write `rows/exact_match`, for example"),
        ("rows/exact_match", "sft", "found `rows/exact_match` of `sft`, which is not an evaluation\n\nhint: name a stage of kind evaluate"),
    ],
)  # fmt: skip
def test_a_figure_that_no_report_can_have_is_refused_before_anything_trains(
    tmp_path: Path, metric: str, compared: str, message: str
) -> None:
    text = FILE.format(metric=metric, old="limit: 5", new="limit: 5", condition="improves_on").replace(
        "improves_on: old", f"improves_on: {compared}"
    )
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "p.yaml")
    assert str(caught.value).partition(": ")[2] == f"demo.gate.require.0.metric: {message}"


@pytest.mark.parametrize(
    ("metric", "old", "new"),
    [
        ("rows/bits_per_byte_stderr", "limit: 5", "limit: 5"),
        ("rows/exact_match", "num_fewshot: 5", "num_fewshot: 0, seed: 1, include_path: mine"),
        ("arc/acc", "max_new_tokens: 8", "max_new_tokens: 9"),
        ("rows/bits_per_byte", "max_new_tokens: 8", "max_new_tokens: 9"),
        ("arc/acc", "apply_chat_template: false", "backend: vllm, resources: {gpus: 1}"),
    ],
)
def test_what_does_not_change_the_question_may_differ(tmp_path: Path, metric: str, old: str, new: str) -> None:
    (tmp_path / "p.yaml").write_text(FILE.format(metric=metric, old=old, new=new, condition="improves_on"))
    load(tmp_path / "p.yaml")


def evaluation(**fields: Any) -> EvaluateStage:
    return EvaluateStage.model_validate({"kind": "evaluate", "model": "m", "datasets": ["rows"], "benchmarks": ["arc"], **fields})


PLAIN: dict[str, Any] = {"rows": {"dataset0": 8, "arc": 5}, "dtype": "float32"}
MET = ["met: arc/acc of new is 0.5, required at least 0 over old's 0.4 (is +0.1)"]
VERDICTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool, list[str]]] = {
    "alike": ({}, PLAIN, True, MET),
    "an older report": ({}, {"rows": PLAIN["rows"]}, True, MET),
    "dtype": (
        {}, {**PLAIN, "dtype": "bfloat16"}, True,
        [*MET, "note: new was computed by transformers in float32, old by transformers in bfloat16: they round differently"],
    ),
    "backend": (
        {"backend": "vllm"}, {"rows": PLAIN["rows"]}, True,
        [*MET, "note: new was computed by transformers, old by vllm: they round differently"],
    ),
    "template": (
        {"apply_chat_template": False}, PLAIN, True, [*MET, "note: new uses the chat template for benchmarks, old does not"],
    ),
    "rows": (
        {}, {**PLAIN, "rows": {"dataset0": 8, "arc": 4}}, False,
        ["NOT met: arc/acc is over 5 rows in new and 4 rows in old: different rows cannot be compared; `--force` both evaluations"],
    ),
    "rows of something else": ({}, {**PLAIN, "rows": {"dataset0": 7, "arc": 5}}, True, MET),
}  # fmt: skip


@pytest.mark.parametrize("what", VERDICTS)
def test_what_only_reports_tell_is_told_with_the_verdict(what: str) -> None:
    fields, info, passes, lines = VERDICTS[what]
    gate = GateStage.model_validate({"kind": "gate", "require": [{"metric": "arc/acc", "of": "new", "improves_on": "old"}] * 2})
    manifests = {"new": manifest(PLAIN, **{"arc/acc": 0.5}), "old": manifest(info, **{"arc/acc": 0.4})}
    passed, found = judge(gate, {"new": evaluation(), "old": evaluation(**fields)}, manifests)
    assert passed == passes
    assert list(dict.fromkeys(found)) == lines
    assert len(found) == len(lines) + 1, "of two requirements both have a line, and what is to be known is said once"
