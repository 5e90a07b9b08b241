"""Messages of `validate` about dpo and kto stages, their keys, and the metric of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.kinds.dpo import DpoStage
from tuneline.kinds.kto import KtoStage

FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base:  {{kind: model, path: model}}
      data:  {{kind: dataset, sources: [{{type: files, path: a.jsonl}}]}}
      pairs: {{model: base, dataset: data, {rest}}}
      eval:  {{kind: evaluate, model: base, datasets: [data]}}
      gate:  {{kind: gate, require: [{{metric: data/preference_accuracy, of: eval, at_least: 0.5}}]}}
"""
REFUSED = {
    "smoothing": (
        "kind: dpo, label_smoothing: 0.1",
        "demo.pairs.label_smoothing: found label_smoothing with `loss_type: sigmoid`, which ignores it\n\nhint: remove it, or set `loss_type: robust`",
    ),
    "robust": (
        "kind: dpo, loss_type: robust",
        "demo.pairs.loss_type: found robust without label_smoothing, which is the same as sigmoid\n\nhint: set it, for example `label_smoothing: 0.1`, or `loss_type: sigmoid`",
    ),
    "dropout": (
        "kind: kto, lora: {lora_dropout: 0.1}",
        "demo.pairs.lora.lora_dropout: found 0.1, expected 0 for kto: the model is compared with a reference without dropout\n\nhint: remove it",
    ),
    "sequence parallelism": (
        "kind: dpo, resources: {processes: 2, sequence_parallel_size: 2}",
        "demo.pairs.resources.sequence_parallel_size: found 2 for dpo, expected 1: TRL supports sequence parallelism only for sft\n\nhint: remove it",
    ),
    "packing": (
        "kind: dpo, packing: true",
        "demo.pairs.packing: found the unknown field `packing`, expected a field of dpo",
    ),
    "a loss of another kind": ("kind: dpo, loss_type: simpo", "demo.pairs.loss_type: found 'simpo', expected sigmoid, ipo, hinge"),
}  # fmt: skip


def problem(tmp_path: Path, rest: str) -> str:
    (tmp_path / "pipelines.yaml").write_text(FILE.format(rest=rest))
    with pytest.raises(ConfigError) as failure:
        load(tmp_path / "pipelines.yaml")
    return str(failure.value)


@pytest.mark.parametrize("case", REFUSED)
def test_fields_without_effect_are_refused(tmp_path: Path, case: str) -> None:
    rest, message = REFUSED[case]
    assert message in problem(tmp_path, rest)


def test_a_full_training_with_the_rate_of_adapters_is_warned_of() -> None:
    (warning,) = DpoStage(kind="dpo", model="base", dataset="data", method="full").warnings()
    assert warning.hint == "set a lower one, for example `learning_rate: 5e-7`"


def test_a_pair_is_two_sequences_and_a_full_training_needs_a_second_model() -> None:
    dpo, kto = DpoStage(kind="dpo", model="base", dataset="data"), KtoStage(kind="kto", model="base", dataset="data")
    assert (dpo.micro_batch_size(), dpo.sequences_per_row()) == (4, 2)
    assert (kto.micro_batch_size(), kto.sequences_per_row()) == (8, 1)
    assert not dpo.copies_base()
    assert dpo.model_copy(update={"method": "full"}).copies_base()
