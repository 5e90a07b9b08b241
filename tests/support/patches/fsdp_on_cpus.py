"""Has accelerate use FSDP2 on CPUs, over gloo: torch can, but accelerate 1.15 keeps it to accelerators and trains plain DDP."""

from typing import Any

from tasks.log_filters import silence

silence()  # as programs do before they import anything

from accelerate import state  # noqa: E402
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule  # noqa: E402

REAL = state.AcceleratorState.__init__


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    REAL(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:  # what it does for several GPUs
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP


def whole_gradients(self: Any, requires_gradient_sync: bool) -> None:
    assert requires_gradient_sync, "between micro-batches each process would hold the whole gradients"


state.AcceleratorState.__init__ = init
FSDPModule.set_requires_gradient_sync = whole_gradients
CPUOffloadPolicy.__init__.__defaults__ = (False,)  # no pinned memory, which is for copies to a GPU
