"""The kto program on pico models: what it learns of labeled answers, and that no micro-batch or kill changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preference_tools import LABELED, PAIRS, SMALL, curve, labeled, request_for
from process_tools import finish
from program_tools import payload_digest, run_program, run_until

from tasks.training.kto import balance, others
from tasks.training.kto import labeled as as_labeled
from tuneline.errors import StageFailed
from tuneline.kinds.kto import KtoStage
from tuneline.workspace.protocol import Input

OF_LABELS = [f"{of}/{label}" for of in ("rewards", "logps") for label in ("chosen", "rejected")]
CURVES = ["loss", "kl", "rewards/margins", *OF_LABELS]
FIELDS: dict[str, Any] = {
    "kind": "kto",
    "rows": LABELED,
    "validation": [labeled(i) for i in range(50, 57)],
    "eval_steps": 2,
    "max_steps": 4,
}


def test_no_micro_batch_and_no_kill_changes_it(tmp_path: Path, base: Input) -> None:
    """Eleven rows in steps of four: the last step of an epoch has three. The distance from the reference is that of the whole step."""
    runs = {size: request_for(tmp_path / str(size), base, **FIELDS, resources={"micro_batch_size": size}) for size in (4, 1)}
    for request in runs.values():
        result, events = run_program(request)
    for name in (*CURVES, *(f"eval_{name}" for name in CURVES)):
        assert curve(runs[1], name) == pytest.approx(curve(runs[4], name), rel=1e-3, abs=1e-4)
    assert curve(runs[1], "rows") == [4, 4, 3, 4]
    assert curve(runs[1], "loss")[0] == pytest.approx(0.5, abs=1e-4)
    assert curve(runs[1], "rewards/margins")[-1] > 1
    assert max(curve(runs[1], "kl")) > 0
    assert result.metrics["eval_reward_margin"] > 1
    assert {"reward_margin", "reward_desirable", "reward_undesirable", "kl"} <= {event.get("name") for event in events}

    killed = request_for(tmp_path / "killed", base, **FIELDS, resources={"checkpoint_steps": 2, "micro_batch_size": 4})
    run_until(killed, 4)
    run_program(killed)
    assert payload_digest(killed) == payload_digest(runs[4])


@pytest.mark.full
@pytest.mark.parametrize("adapter", [{"vera": {"r": 32}}, {"oft": {"oft_block_size": 16}}, {"ia3": {}}], ids=lambda each: next(iter(each)))
def test_other_adapters_learn_too(tmp_path: Path, base: Input, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SMALL, "lora")
    request = request_for(tmp_path, base, **FIELDS, **adapter, learning_rate=5e-2)
    run_program(request)
    margins = curve(request, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > 0.1


@pytest.mark.full
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_losses_are_the_same_in_two_processes(tmp_path: Path, base: Input, loss_type: str) -> None:
    """With rows that are repeated to fill up the last step of an epoch, and weights."""
    fields = FIELDS | {"loss_type": loss_type, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    alone = request_for(tmp_path / "alone", base, **fields)
    run_program(alone)
    together = request_for(tmp_path / "together", base, **fields, resources={"processes": 2, "micro_batch_size": 1})
    finish(together, 2)
    for name in ("loss", "rewards/margins", *OF_LABELS, "eval_loss", "eval_rewards/margins"):
        assert curve(together, name) == pytest.approx(curve(alone, name), rel=1e-3, abs=1e-4)


def test_pairs_are_two_labeled_answers_and_rows_without_a_label_are_refused(tmp_path: Path, base: Input) -> None:
    found = as_labeled([PAIRS[0], *LABELED[:2]], "train")
    assert [row.label for row in found] == [True, False, True, False]
    assert [row.rejected for row in found] == [None] * 4
    assert found[1].messages is not None
    assert found[1].messages[-1] == PAIRS[0].rejected
    rows = [*LABELED, replace(LABELED[0], label=None, id="silent", source="sources.1", group="silent")]
    with pytest.raises(StageFailed, match=r"1 of 12 train rows have no label, first row silent of sources\.1"):
        run_program(request_for(tmp_path, base, kind="kto", rows=rows))


def test_every_row_gets_an_answer_of_another_prompt() -> None:
    prompts = [[i // 2] for i in range(40)]
    found = others(prompts, 0)
    assert all(prompts[other] != prompts[row] for row, other in enumerate(found))
    assert len(set(found)) > 25
    assert found == others(prompts, 0) != others(prompts, 1)
    assert others([[1], [1]], 0) == [1, 0]
    assert others([[1]], 0) == [0]


def test_unequal_numbers_of_labels_are_warned_of() -> None:
    stage = KtoStage(kind="kto", model="base", dataset="data")
    assert balance([True, False], stage) is None
    assert balance([True, False, False, False, False], stage) == (
        "1 desirable and 4 undesirable answers: the paper recommends `desirable_weight` from 4.00 to 5.33"
    )
    assert balance([True, *[False] * 4], stage.model_copy(update={"desirable_weight": 4.5})) is None
    assert balance([True], stage) == "all 1 answers are desirable: the model learns no difference"
