"""Lines of libraries that people take for errors of their stage, and banners, kept out of its log: these and no others."""

from __future__ import annotations

import logging
import os
import warnings

from tuneline.patches import patch

FAILURE_SUFFIX: dict[str, tuple[str, ...]] = {  # by logger: how the line begins
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # of a package that we leave out; it has no gradient
    "torchao": ("Failed to load ",),  # kernels for other devices; PEFT imports it, and nothing of it is used
    "torch.utils._pytree": ("%s is an Enum subclass",),  # torchao's own, of torch 2.13
    "DeepSpeed": ("Setting accelerator to CPU", "MPU is not provided"),
    "transformers": ("PyTorch was not found",),  # datasets need none of it
    "transformers.trainer_utils": (
        "Warning: The following arguments do not match",  # resources, which may be others after a resume
        "mtime may not be reliable",  # it sorts checkpoints by their numbers then, as we do
    ),
    "lm_eval.models.huggingface": ("`pretrained` model kwarg", "Passed an already-initialized model", "Overrode HF model backend"),
}
DEPRECATED = (  # what they call of one another, FutureWarnings all
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",  # DeepSpeed 0.19 of torch 2.13
    r"`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 and TRL 1.15 of transformers 5.23
)


def silence() -> None:
    """Before the libraries are imported: some speak then."""
    for name, beginnings in FAILURE_SUFFIX.items():
        logging.getLogger(name).addFilter(lambda record, beginnings=beginnings: not str(record.msg).startswith(beginnings))  # type: ignore[misc]
    for name in ("httpx", "accelerate"):  # libraries turn information on for all, where these tell each request and each gathering
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"  # bars that redraw themselves; progress is in the events
    # gptqmodel's banner comes as information of a logger that sets its level itself, its warning is of the GIL.
    patch(logging.getLogger("logbar"), "isEnabledFor", logging.WARNING.__le__)
    os.environ["GPTQMODEL_DISABLE_GIL_WARNING"] = "1"
    for message in DEPRECATED:
        warnings.filterwarnings("ignore", message, FutureWarning)
