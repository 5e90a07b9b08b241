"""Lines of libraries that people take for errors of their stage, kept out of its log: these and no others."""

from __future__ import annotations

import logging
import warnings

SAID = {  # by logger: how the line begins
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # a kernel without a gradient, for a package that we leave out
    "torchao": "Failed to load ",  # kernels for other devices; PEFT imports it, and nothing of it is used
}
DEPRECATED = (  # what they call of one another, FutureWarnings all
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",  # DeepSpeed 0.19 of torch 2.13
    r"`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 and TRL 1.15 of transformers 5.23
)


def silence() -> None:
    """Before the libraries are imported: some speak then."""
    for name, beginning in SAID.items():
        logging.getLogger(name).addFilter(lambda record, beginning=beginning: not str(record.msg).startswith(beginning))  # type: ignore[misc]
    for message in DEPRECATED:
        warnings.filterwarnings("ignore", message, FutureWarning)
