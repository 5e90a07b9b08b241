"""What the tests of vLLM share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.engine.client import Engine, Sampling
from tuneline.watchdog import descendants

ROOM = 192  # tokens of a prompt and its completion, of the tests' server
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 8, 9, 10, 11, 12, 13], [100]]
GREEDY = Sampling(max_tokens=12, temperature=0)
SAMPLED = Sampling(max_tokens=64, temperature=1.0)


def borrowed_from(server: Engine, asked: Callable[..., None]) -> type:
    """A class in the place of Engine whose objects are the server: `asked` gets what each would have been started with."""

    class Borrowed:
        def __init__(self, *arguments: Any, **named: Any):
            bound = inspect.signature(Engine).bind(*arguments, **named)
            asked(*bound.args)
            bound.arguments["place"].log.write_text("")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None:
            for name in list(server._loaded):
                server.unload(name)
                server._names.discard(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(server, name)

    return Borrowed


def family_of(process: int) -> dict[int, str]:
    """The command of everything that `process` has started, by process id."""
    return {found: Path(f"/proc/{found}/cmdline").read_text().replace("\0", " ") for found in descendants(process)}


def alive(family: dict[int, str]) -> list[str]:
    return [name for process, name in family.items() if Path(f"/proc/{process}").exists()]
