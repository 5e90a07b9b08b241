"""What may run at the same time in one run: so many stages, and each GPU for one of them.

GPUs are handed out by their ids, so that two stages never share one. Between runs of one machine nothing is kept apart yet:
start one at a time on a GPU machine, or give each its own CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneline.errors import StageFailed


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class Slots:
    def __init__(self, stages: int | None, gpus: list[str]):
        """`stages` at once; by default one for each GPU, or one."""
        self._free_stages, self._free_gpus, self._all_gpus = stages or max(1, len(gpus)), list(gpus), len(gpus)
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, gpus: int) -> Iterator[list[str]]:
        """Waits for a slot and so many GPUs, and yields their ids. Raises StageFailed where the machine has fewer."""
        if gpus > self._all_gpus:
            hint = "set resources.gpus to what there is: 0 runs on the CPU"
            raise StageFailed("config", f"resources.gpus is {gpus}, but this machine shows {self._all_gpus}", hint)
        with self._changed:
            self._changed.wait_for(lambda: self._free_stages > 0 and len(self._free_gpus) >= gpus)
            self._free_stages -= 1
            ids, self._free_gpus = self._free_gpus[:gpus], self._free_gpus[gpus:]
        try:
            yield ids
        finally:
            with self._changed:
                self._free_stages += 1
                self._free_gpus = sorted(self._free_gpus + ids)
                self._changed.notify_all()
