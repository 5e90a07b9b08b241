"""What tests of strategies compare."""

from __future__ import annotations

from typing import Any

from sft_tools import OTHERS, ROWS

from tuneline.workspace.protocol import Failure, Request

# Rows that divide by neither the batch nor the processes; a validation loss along the way.
FIELDS: dict[str, Any] = {
    "rows": [*ROWS, OTHERS[4]], "global_batch_size": 4, "max_steps": 16, "eval_steps": 4, "validation": OTHERS[:3],
}  # fmt: skip


TOLERANCE = 1e-4  # relative, of losses: sums in another order


def failure(request: Request) -> Failure:
    found: Failure = Failure.read(request.work / "failure.json")
    return found


def with_resources(request: Request, **changed: Any) -> Request:
    return request.model_copy(update={"resources": {**request.resources, **changed}})
