"""stub"""
from __future__ import annotations
from typing import Any
from tasks.scoring import exact_match


def reward_functions(rewards: Any, files: Any) -> list[Any]:
    def make(r: Any) -> Any:
        def f(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
            if r.type == "length":
                return [sum(i < 4000 for i in c) / len(c) for c in completion_ids]
            return [exact_match(c, a or "") for c, a in zip(completions, columns["answer"], strict=True)]
        f.__name__ = r.label
        return f
    return [make(r) for r in rewards]


def check_rows(rewards: Any, rows: Any) -> None:
    pass
