"""Reports the device that a program computed on and the memory it took. These facts are for users and in no key."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any


def computed_on() -> dict[str, Any]:
    """Return `peak_memory` of this process in bytes; on GPUs also `device` (name), `devices` (count) and `peak_device_memory`."""
    status = Path("/proc/self/status")
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    facts: dict[str, Any] = {"peak_memory": int(peak[1]) * 1024} if peak else {}
    torch = sys.modules.get("torch")  # never imported only for this report
    if torch is not None and torch.cuda.is_initialized():
        facts |= {
            "device": torch.cuda.get_device_name(),
            "devices": int(os.environ.get("WORLD_SIZE", "1")),
            "peak_device_memory": torch.cuda.max_memory_allocated(),
        }
    return facts
