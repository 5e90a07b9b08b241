"""Limit what runs at the same time: a number of stages of one run, and one stage of any run on each GPU of the machine.

A GPU is locked by flock on its file `<temporary folder>/tuneline-gpus/<id>`, which every user of the machine may lock. The program's
watchdog inherits the lock, so the GPU is free exactly when the last process of the stage is gone. A stage takes all of its GPUs
at once or none, so no stage holds one GPU while it waits for another.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.errors import StageFailed, StageStopped
from tuneline.files import try_lock

FOLDER = Path(tempfile.gettempdir()) / "tuneline-gpus"
POLL = 0.5  # seconds between two attempts to lock a GPU


@dataclass(frozen=True)
class Taken:
    """Ids of GPUs, and the descriptors that hold their locks."""

    gpus: list[str]
    descriptors: tuple[int, ...]


class Slots:
    def __init__(self, stages: int | None, gpus: Sequence[str], folder: Path = FOLDER):
        """`stages`: how many run at once, by default one for each GPU, at least one. `gpus`: ids of the GPUs that may be taken."""
        self._free_stages, self._gpus, self._folder = stages or max(1, len(gpus)), list(gpus), folder
        self._changed = threading.Condition()

    @contextmanager
    def taken(
        self,
        gpus: int,
        devices: Sequence[int] | None = None,
        holder: dict[str, Any] | None = None,
        on_wait: Callable[[str], None] = lambda message: None,
        keep_waiting: Callable[[], bool] = lambda: True,
    ) -> Iterator[Taken]:
        """Hold a slot and `gpus` GPUs, of `devices` if given; wait until they are free. `holder`: shown to stages that wait for them.

        Raises StageFailed if the machine lacks them, and StageStopped once `keep_waiting` returns False.
        """
        wanted = self._wanted(gpus, devices)
        found, reported = self._slot_and_gpus(wanted, gpus, holder or {}), ""
        while found is None:
            if not keep_waiting():
                raise StageStopped
            held = self.held_by_others(wanted) if gpus else []
            if held and reported != (reported := "; ".join(held)):
                on_wait(f"waits for {gpus} of GPU {', '.join(wanted)}: {reported}")
            with self._changed:
                self._changed.wait(POLL)
            found = self._slot_and_gpus(wanted, gpus, holder or {})
        try:
            yield found
        finally:
            for descriptor in found.descriptors:
                os.close(descriptor)
            with self._changed:
                self._free_stages += 1
                self._changed.notify_all()

    def _wanted(self, gpus: int, devices: Sequence[int] | None) -> list[str]:
        if gpus > len(self._gpus):
            hint = "set resources.gpus to the number of GPUs that it has; 0 runs on the CPU"
            raise StageFailed("config", f"resources.gpus is {gpus}, but this machine shows {len(self._gpus)}", hint)
        if devices is None:
            return self._gpus
        absent = [str(device) for device in devices if str(device) not in self._gpus]
        if absent:
            shown = ", ".join(self._gpus) or "none"
            raise StageFailed(
                "config", f"resources.devices names {', '.join(absent)}, but this machine shows {shown}", "name other devices"
            )
        return [str(device) for device in devices]

    def _slot_and_gpus(self, wanted: list[str], gpus: int, holder: dict[str, Any]) -> Taken | None:
        with self._changed:
            if self._free_stages == 0:
                return None
            found = self._take(wanted, gpus, holder)
            if found is not None:
                self._free_stages -= 1
            return found

    def _take(self, wanted: list[str], gpus: int, holder: dict[str, Any]) -> Taken | None:
        """Lock the first `gpus` free ones, or none."""
        ids: list[str] = []
        descriptors: list[int] = []
        for gpu in wanted if gpus else ():
            descriptor = self._open(gpu)
            if not try_lock(descriptor):
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "since": time.time(), **holder}).encode(), 0)
            ids.append(gpu)
            descriptors.append(descriptor)
            if len(ids) == gpus:
                break
        if len(ids) == gpus:
            return Taken(ids, tuple(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _open(self, gpu: str) -> int:
        with suppress(FileExistsError):
            self._folder.mkdir()
            self._folder.chmod(0o1777)
        path = self._folder / gpu.replace("/", "-")
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with suppress(PermissionError):  # another user was faster
                os.fchmod(descriptor, 0o666)
            return descriptor

    def held_by_others(self, gpus: Sequence[str]) -> list[str]:
        """Describe which of the GPUs is held by what."""
        found = []
        for gpu in gpus:
            descriptor = self._open(gpu)
            if not try_lock(descriptor, shared=True):
                with suppress(ValueError, KeyError):
                    holder = json.loads(os.pread(descriptor, 4096, 0))
                    since = time.strftime("%H:%M", time.localtime(holder["since"]))
                    stage = holder.get("stage", "another program")
                    found.append(f"{gpu} is held by {stage} (process {holder['pid']}, since {since})")
            os.close(descriptor)
        return found
