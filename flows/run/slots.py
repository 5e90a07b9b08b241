"""What may run at the same time: so many stages of one run, and on each GPU of the machine one stage of any run.

A GPU is taken by an flock on a file of its own, `<temporary folder>/tuneline-gpus/<id>`, which every user of the machine may take.
The program's watchdog inherits it, so it is free again exactly when the last process of the stage is gone, however that happened. Whoever
wants several takes all of them at once or none: nobody ever holds one and waits for another.
"""

from __future__ import annotations

import fcntl
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

FOLDER = Path(tempfile.gettempdir()) / "tuneline-gpus"
POLL = 0.5  # seconds between two looks for a free GPU


@dataclass(frozen=True)
class Taken:
    """GPUs by their ids, and the descriptors that hold them."""

    gpus: list[str]
    descriptors: tuple[int, ...]


class Slots:
    def __init__(self, stages: int | None, gpus: Sequence[str], folder: Path = FOLDER):
        """`stages` at once; by default one for each GPU, or one. `gpus` are the ids of those that may be taken."""
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
        """Waits for a slot and so many GPUs, or just `devices`. `holder` is what others are told who wait for them.

        Raises StageFailed where the machine has not got them, and once `keep_waiting` says no.
        """
        wanted = self._wanted(gpus, devices)
        found, told = self._slot_and_gpus(wanted, gpus, holder or {}), ""
        while found is None:
            if not keep_waiting():
                raise StageStopped
            held = self.held_by_others(wanted) if gpus else []
            if held and told != (told := "; ".join(held)):
                on_wait(f"waits for {gpus} of GPU {', '.join(wanted)}: {told}")
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
            hint = "set resources.gpus to what there is: 0 runs on the CPU"
            raise StageFailed("config", f"resources.gpus is {gpus}, but this machine shows {len(self._gpus)}", hint)
        if devices is None:
            return self._gpus
        absent = [str(device) for device in devices if str(device) not in self._gpus]
        if absent:
            shown = ", ".join(self._gpus) or "none"
            raise StageFailed("config", f"resources.devices names {', '.join(absent)}, but this machine shows {shown}", "name others")
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
        """The first so many that are free, or none at all."""
        ids: list[str] = []
        descriptors: list[int] = []
        for gpu in wanted if gpus else ():
            descriptor = self._open(gpu)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
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
        """Who holds which, in words."""
        found = []
        for gpu in gpus:
            descriptor = self._open(gpu)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                with suppress(ValueError, KeyError):
                    told = json.loads(os.pread(descriptor, 4096, 0))
                    who = told.get("stage", "another program")
                    found.append(
                        f"{gpu} is held by {who} (process {told['pid']}, since {time.strftime('%H:%M', time.localtime(told['since']))})"
                    )
            finally:
                os.close(descriptor)
        return found
