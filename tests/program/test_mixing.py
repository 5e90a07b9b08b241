"""`max_rows`, `repeat`, `weight` and `system` of a source: which rows are used, how often, and what the report says of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import Build, build, sums
from hypothesis import given
from hypothesis import strategies as some
from program_tools import payload_digest

from tasks.data.mixing import shares
from tuneline.errors import StageFailed

A, B, C = (sums(count, start) for count, start in ((40, 0), (20, 100), (10, 200)))


def mixed(folder: Path, *sources: tuple[list[dict[str, Any]], dict[str, Any]], **stage: Any) -> Build:
    folder.mkdir(exist_ok=True)
    listed = []
    for i, (records, fields) in enumerate(sources):
        name = f"{i}.jsonl"
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        listed.append({"type": "files", "path": name, **fields})
    return build(folder, listed, **stage)


def times(run: Build, split: str = "train") -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for row in run.rows(split):
        found.setdefault(row.source, Counter())[row.prompt or ""] += 1
    return found


def test_max_rows_draws_the_same_rows_whatever_stands_around_them(tmp_path: Path) -> None:
    run = mixed(tmp_path / "a", (A, {"max_rows": 15}), (B, {"max_rows": 50}))
    drawn = set(times(run)["sources.0"])
    assert len(drawn) == 15
    assert len(times(run)["sources.1"]) == 20
    assert [row.prompt for row in run.rows()][:15] == [record["prompt"] for record in A if record["prompt"] in drawn]
    assert run.result.metrics["not_drawn"] == 25
    (first, second) = json.loads((run.request.meta / "report.json").read_text())["sources"]
    assert (first["fates"], first["splits"]["train"], second["fates"]) == ({"not_drawn": 25}, 15, {})
    assert "| 0.jsonl | 40 | 0 | 0 | 0 | 25 | 15 |" in re.sub(" +", " ", run.report())
    assert not run.warnings()
    other = mixed(tmp_path / "b", (A[::-1], {"max_rows": 15}))
    assert set(times(other)["sources.0"]) == drawn
    more = mixed(tmp_path / "c", (A + sums(4, 50), {"max_rows": 15}))
    assert len(set(times(more)["sources.0"]) & drawn) >= 11
    assert set(times(mixed(tmp_path / "d", (A, {"max_rows": 15}), seed=1))["sources.0"]) != drawn
    split = mixed(tmp_path / "e", (A, {"max_rows": 15}), split={"test": 0.4})
    assert {row.prompt for row in split.every()} == drawn  # what is drawn does not decide the split
    assert 2 <= len(split.rows("test")) <= 10


def test_max_rows_counts_rows_that_are_left(tmp_path: Path) -> None:
    """Not duplicates, bad rows, nor what another source has already given."""
    run = mixed(tmp_path / "a", (A[:30], {}), ([*A, {"prompt": 1}, *A], {"max_rows": 8, "on_bad_row": "drop"}))
    assert len(times(run)["sources.1"]) == 8
    fates = json.loads((run.request.meta / "report.json").read_text())["sources"][1]["fates"]
    assert fates == {"bad_rows": 1, "duplicates": 70, "not_drawn": 2}
    same = mixed(tmp_path / "b", (A[:2] * 5, {"max_rows": 7}), dedup="none")
    assert sum(times(same)["sources.0"].values()) == 7


def test_rows_are_repeated_in_train_only_and_never_over_splits(tmp_path: Path) -> None:
    run = mixed(tmp_path / "a", (A, {"repeat": 3}), (B, {}), split={"test": 0.3, "validation": 0.2})
    found = times(run)
    assert set(found["sources.0"].values()) == {3}
    assert set(found["sources.1"].values()) == {1}
    for split in ("validation", "test"):
        assert {count for source in times(run, split).values() for count in source.values()} == {1}
        assert not {row.group for row in run.rows(split)} & {row.group for row in run.rows()}
    first, second = json.loads((run.request.meta / "report.json").read_text())["sources"]
    train = len(found["sources.0"])
    assert first["splits"] == {
        "train": train,
        "validation": first["splits"]["validation"],
        "test": first["splits"]["test"],
        "shown": 3 * train,
    }
    assert sum(first["splits"][split] for split in ("train", "validation", "test")) == 40
    assert second["splits"]["shown"] == second["splits"]["train"]
    assert run.result.metrics["rows_train"] == len(run.rows()) == 3 * train + second["splits"]["train"]
    plain = mixed(tmp_path / "b", (A, {}), (B, {}), split={"test": 0.3, "validation": 0.2})
    assert list(dict.fromkeys(row.id for row in run.rows())) == [row.id for row in plain.rows()]
    assert [row.id for row in run.rows("test")] == [row.id for row in plain.rows("test")]


def test_weights_are_shares_of_the_train_split(tmp_path: Path) -> None:
    sources: tuple[tuple[list[dict[str, Any]], dict[str, Any]], ...] = ((A, {"weight": 1}), (B, {"weight": 1}), (C, {"weight": 2}))
    run = mixed(tmp_path / "a", *sources)
    found = times(run)
    assert {name: sum(counts.values()) for name, counts in found.items()} == {"sources.0": 18, "sources.1": 17, "sources.2": 35}
    assert set(found["sources.0"].values()) == set(found["sources.1"].values()) == {1}
    assert sorted(found["sources.2"].values()) == [3] * 5 + [4] * 5
    assert run.result.metrics["rows_train"] == 70
    assert run.result.metrics["not_drawn"] == 22 + 3
    report = json.loads((run.request.meta / "report.json").read_text())["sources"]
    assert [source["splits"]["shown"] for source in report] == [18, 17, 35]
    assert [source["splits"]["train"] for source in report] == [18, 17, 10]
    assert payload_digest(run.request) == payload_digest(mixed(tmp_path / "b", *sources).request)
    held = mixed(tmp_path / "c", *sources, split={"test": 0.3})
    plain = mixed(tmp_path / "d", (A, {}), (B, {}), (C, {}), split={"test": 0.3})
    assert [row.id for row in held.rows("test")] == [row.id for row in plain.rows("test")]
    assert len(held.rows()) == len(plain.rows())


def test_a_source_whose_weight_gives_it_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"sources\.1: found a weight of 1e-06, but no row of it in the train split"):
        mixed(tmp_path / "a", (A, {"weight": 1}), (B, {"weight": 1e-6}))
    with pytest.raises(StageFailed, match=r"sources\.1: found a weight of 1, but no row"):
        mixed(tmp_path / "b", (A, {"weight": 1}), (A, {"weight": 1}))


@given(some.lists(some.floats(1e-3, 1e3), min_size=1, max_size=6), some.integers(0, 1000))
def test_shares_are_whole_and_as_near_as_they_can_be(weights: list[float], total: int) -> None:
    found = shares(weights, total)
    assert sum(found) == total
    assert all(abs(share - total * weight / sum(weights)) < 1 for share, weight in zip(found, weights, strict=True))


def test_a_sources_system_prompt_comes_before_the_stages(tmp_path: Path) -> None:
    def chats(word: str) -> list[dict[str, Any]]:
        own = [{"role": "system", "content": "Own."}]
        turns = [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": "Yes."}]
        return [{"messages": turns}, {"messages": [*own, {"role": "user", "content": f"{word}!"}, turns[1]]}]

    run = mixed(tmp_path / "a", (chats("a"), {}), (chats("b"), {"system": "Of b."}), (chats("c"), {"system": ""}), (B, {}), system="All.")
    first = [row.messages[0]["content"] for row in run.rows() if row.messages]
    assert first == ["All.", "Own.", "Of b.", "Own.", "c?", "Own."]
    assert "the system prompt is only for conversations: 20 rows of other formats do not get it" in run.warnings()
    alone = mixed(tmp_path / "b", (chats("a"), {"system": "Of a."}), (B, {}))
    assert not [warning for warning in alone.warnings() if "system prompt" in warning]
