"""Pools that could deadlock are rejected, other pools are not."""

from __future__ import annotations

import pytest
from load_tools import load_text

from tuneline.errors import ConfigError

TWO = """\
version: 1
pools:
  cpu: {type: process, concurrency: 1}
  gpu: {type: process, concurrency: 1}
pipelines:
  train:
    pool: cpu
    stages:
      data: {kind: dataset, sources: [{type: files, path: a.jsonl}]}
      more: {kind: dataset, pool: gpu, sources: [{type: files, path: b.jsonl}]}
  serve:
    pool: gpu
    stages:
      data: {kind: dataset, pool: cpu, sources: [{type: files, path: a.jsonl}]}
"""
GPU = "gpu: {type: process, concurrency: 1}"


def found(text: str) -> str:
    try:
        load_text(text)
    except ConfigError as error:
        return str(error)
    return ""


def test_two_pipelines_that_would_wait_for_one_another_are_refused() -> None:
    message = found(TWO)
    assert message.startswith(
        "p.yaml:3:37: pools.cpu.concurrency: found 1, with which runs in cpu (train) and gpu (serve) can hold all slots"
    )
    assert message.endswith("hint: set `concurrency` to 2 or more in one of these pools, or remove it")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (GPU, "gpu: {type: process}"),
        (GPU, "gpu: {type: process, concurrency: 2}"),
        ("kind: dataset, pool: gpu", "kind: dataset"),
        ("kind: dataset, pool: cpu", "kind: dataset, pool: gpu"),
        ("    pool: gpu\n", ""),
    ],
)
def test_what_cannot_fill_every_place_is_allowed(old: str, new: str) -> None:
    assert TWO.count(old) == 1
    assert "wait for each other" not in found(TWO.replace(old, new))


@pytest.mark.parametrize(
    "more",
    ["    concurrency: 2\n", "    schedules: {night: {cron: 0 2 * * *, queue: other}}\n"],
)
def test_more_runs_of_a_pipeline_fill_more_places(more: str) -> None:
    text = TWO.replace("cpu: {type: process, concurrency: 1}", "cpu: {type: process, concurrency: 2, queues: {other: {priority: 2}}}")
    assert found(text) == ""
    message = found(text.replace("    pool: cpu\n", f"    pool: cpu\n{more}"))
    assert "pools.cpu.concurrency: found 2, with which" in message


def test_a_ring_of_three() -> None:
    third = "  a: {type: process, concurrency: 1}\npipelines:\n  third:\n    pool: a\n    stages:\n      data: {kind: dataset, pool: cpu, sources: [{type: files, path: a.jsonl}]}\n"
    text = TWO.replace("pipelines:\n", third).replace(
        "pool: cpu, sources: [{type: files, path: a.jsonl}]}\n", "pool: a, sources: [{type: files, path: a.jsonl}]}\n"
    )
    text = text.replace(
        "    pool: a\n    stages:\n      data: {kind: dataset, pool: a", "    pool: a\n    stages:\n      data: {kind: dataset, pool: cpu"
    )
    assert "runs in cpu (train) and gpu (serve) and a (third) can" in found(text)
