"""evaluate in several processes: the report of one, whichever process computes a batch, and the end of all if one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from evaluate_tools import CHATS, own_benchmarks, request_for
from process_tools import finish, start, start_until, state, steps
from processes import PATIENCE, until
from program_tools import payload_digest
from strategy_tools import failure, with_resources

from tasks.data.rows import Row
from tasks.evaluation.code_benchmark import score
from tasks.evaluation.sharing import Share, batches_to_score, batches_to_write
from tuneline.workspace.file_names import REPORT_TEXT, SAMPLES
from tuneline.workspace.protocol import Events, Input, Request

TEXTS = [Row(source="s", text="One text, é and all. " * (i + 1), id=f"text{i}") for i in range(5)]


@pytest.fixture
def request_of_all(base: Input, tmp_path: Path) -> Request:
    """Datasets, and benchmarks of each type; one of them samples its answers."""
    files = own_benchmarks(tmp_path / "own")
    said = (tmp_path / "own" / "said.yaml").read_text(encoding="utf-8")
    drawn = said.replace("task: said", "task: drawn").replace("do_sample: false", "do_sample: true, temperature: 2.0")
    (tmp_path / "own" / "drawn.yaml").write_text(drawn, encoding="utf-8")
    fields: dict[str, Any] = {"include_path": "own", "benchmarks": ["even", "said", "drawn"], "resources": {"micro_batch_size": 3}}
    return request_for(tmp_path / "one", base, CHATS, TEXTS, files=files, **fields)


def elsewhere(request: Request, folder: Path, **resources: Any) -> Request:
    changed = with_resources(request, **resources).model_copy(update={"out": folder / "out", "work": folder / "work"})
    for path in (changed.payload, changed.meta, changed.work):
        path.mkdir(parents=True)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=[pytest.mark.full, pytest.mark.process])], ids=["forked", "real"])
def test_two_processes_give_the_report_of_one(request_of_all: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
    one, two = request_of_all, elsewhere(request_of_all, tmp_path / "two", processes=2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of a real process; another number may round differently
    finish(one, real=real)
    monkeypatch.setenv("PATCHES", "in_turn")
    finish(two, 2, real)
    assert payload_digest(two) == payload_digest(one)
    for name in (SAMPLES, REPORT_TEXT):
        assert (two.meta / name).read_bytes() == (one.meta / name).read_bytes()
    counted = steps(two)
    assert counted[:2] == [3, 7]  # with those of the other process
    assert {5, 7, 16} <= set(counted)


@pytest.mark.slow
def test_killed_a_process_ends_the_evaluation(base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHES", "in_turn")
    killed = request_for(tmp_path, base, CHATS, resources={"processes": 2, "micro_batch_size": 3})
    process, ranks = start_until(killed, 3, 2)
    os.kill(ranks[1], signal.SIGKILL)
    until(lambda: not state(ranks[1]))
    os.kill(ranks[0], signal.SIGCONT)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGKILL, (killed.work / "log.txt").read_text()
    assert (failure(killed).failure_class, failure(killed).message) == ("transient", "process 1 was ended by SIGKILL")


@pytest.mark.slow
def test_out_of_memory_in_one_process_is_that_of_the_stage(base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the flow tries a smaller batch."""
    monkeypatch.setenv("PATCHES", "in_turn no_memory")
    request = request_for(tmp_path, base, CHATS, resources={"processes": 2, "micro_batch_size": 3})
    process = start(request, 2)
    assert process.wait(timeout=PATIENCE) == 1
    assert failure(request).failure_class == "oom"
    assert "process 1: " in failure(request).message


def test_a_slow_process_delays_no_batch_but_its_own() -> None:
    """The other one takes all the rest; both know all results, in the order of the requests."""
    slow, quick = Share(), Share()
    quick.store = slow.store
    taken, others = list[int](), Event()
    batches = [[3, 0], [1], [4, 2]]
    found: dict[Share, list[Any]] = {}

    def work(share: Share) -> None:
        def one(number: int, batch: Any) -> list[Any]:
            if share is slow:
                taken.append(number)
                thread.start()
                assert others.wait(PATIENCE)
            elif number == len(batches) - 1:
                others.set()
            return [[i, number / 3] for i in batch]

        share.begin()
        found[share] = share.compute(batches, one)

    thread = Thread(target=work, args=(quick,))
    work(slow)
    thread.join()
    assert taken == [0]
    assert found[slow] == found[quick] == [[0, 0.0], [1, 1 / 3], [2, 2 / 3], [3, 0.0], [4, 2 / 3]]


def test_batches_of_what_is_computed_together() -> None:
    """Longest first, a context's sequences together; requests that differ only in their last token are one sequence."""
    asked = [("b", {"n": 1}), ("dddd", {"n": 2}), ("a", {"n": 1}), ("ccc", {"n": 1}), ("ee", {"n": 2})]
    assert batches_to_write(asked, [len(prompt) for prompt, _ in asked], 2) == [[3, 2], [0], [1, 4]]
    scored = [(None, [1, 2], [3]), (None, [9], [8, 7, 6]), (None, [1, 2], [4]), (None, [5], [5]), (None, [9], [8, 6]), (None, [9], [4])]
    assert batches_to_score(scored, 2) == [[1, 4], [5, 0, 2], [3]]


def test_only_the_first_process_runs_code_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    found = score(Events(tmp_path / "events.jsonl"), [["pass"]], [{}])
    assert found == [{"completion": "pass", "outcome": "not run here", "detail": ""}]
