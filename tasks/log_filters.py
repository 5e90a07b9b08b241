"""Keeps banners, and lines of libraries that users would mistake for errors of their stage, out of the log."""

from __future__ import annotations

import logging
import os
import warnings

from tuneline.patches import patch

UNWANTED: dict[str, tuple[str, ...]] = {  # logger -> beginnings of its unwanted lines
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # an optional package, which has no gradient
    "torchao": ("Failed to load ",),  # kernels for other devices; imported by PEFT, but unused
    "torch.utils._pytree": ("%s is an Enum subclass",),  # from torchao, with torch 2.13
    "DeepSpeed": ("Setting accelerator to CPU", "MPU is not provided"),
    "transformers": ("PyTorch was not found",),  # datasets do not need it
    "transformers.trainer_utils": (
        "Warning: The following arguments do not match",  # resources, which may change on a resume
        "mtime may not be reliable",  # it then sorts checkpoints by their numbers, as tuneline does
    ),
    "lm_eval.models.huggingface": ("`pretrained` model kwarg", "Passed an already-initialized model", "Overrode HF model backend"),
}
DEPRECATED = (  # FutureWarnings of one library about another, or about what the lock keeps
    r"`(label_smoothing_factor|use_liger_kernel=True)` is deprecated",  # TRL 1.16, about its version 2
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",  # DeepSpeed 0.19, about torch 2.13
    r"`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 and TRL 1.15, about transformers 5.23
)


def silence() -> None:
    """Install the filters. Must run before the libraries are imported: some log at import."""
    for name, beginnings in UNWANTED.items():
        logging.getLogger(name).addFilter(lambda record, beginnings=beginnings: not str(record.msg).startswith(beginnings))  # type: ignore[misc]
    for name in ("httpx", "accelerate"):  # other libraries enable INFO for all; these two would log each request and gathering
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"  # no animated bars; progress is in the events
    # gptqmodel's banner is logged as INFO by a logger that sets its own level; its warning is about the GIL.
    patch(logging.getLogger("logbar"), "isEnabledFor", logging.WARNING.__le__)
    os.environ["GPTQMODEL_DISABLE_GIL_WARNING"] = "1"
    for message in DEPRECATED:
        warnings.filterwarnings("ignore", message, FutureWarning)
