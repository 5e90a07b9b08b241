"""Multiplies float32 matrices on CPUs by oneDNN where torch's MKL would leave half of the CPU unused.

MKL uses AVX-512 on Intel's CPUs only. On AMD's it stops at AVX2, and small products wait for threads that they do not need. oneDNN,
which torch contains as well, uses what the CPU has: on a Zen 5, products of 160 rows take half the time, and those with an adapter's
narrow matrices two thirds. A process that has called `use_fastest` multiplies so in `aten::mm` and `aten::addmm`, which linear layers and
their gradients consist of. Left out: vectors, other types, batched products (attention), all of which stay with torch's own choice.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
BLOCK = 32  # docs/log.md compares others


def use_fastest() -> None:
    """Replace torch's float32 products if oneDNN's are faster on this CPU. Further calls do nothing."""
    if held_back():
        replace()


def held_back() -> bool:
    """Return whether torch multiplies by MKL, on a CPU with AVX-512 of another maker than Intel."""
    known = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and CPU_INFO.is_file()
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in CPU_INFO.read_text()


@functools.cache
def replace() -> torch.library.Library:
    """Register the replacements, as long as the returned library is referenced: by this function's cache, until the process ends."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that torch's own kernel is replaced
        library.impl("mm", mm, "CPU", allow_override=True)
        library.impl("addmm", addmm, "CPU", allow_override=True)
    return library


def suited(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether both are float32 matrices that fit each other, and neither is a vector. MKL is as fast for vectors, and oneDNN
    compiles code for each new shape: GPTQ's outer products have hundreds."""
    fit: bool = a.dtype == b.dtype == torch.float32 and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] > 1
    return fit and a.shape[0] > 1 and b.shape[1] > 1


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if suited(a, b):
        return product(a, b, None)
    return torch.ops.aten.mm.out(a, b, out=a.new_empty(0))


def addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if suited(a, b) and beta == alpha == 1 and c.shape == b.shape[1:] and c.dtype == a.dtype:
        return product(a, b, c)
    return torch.ops.aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return a b + bias. oneDNN keeps code for each shape, megabytes of it, and micro-batches have hundreds of lengths: so rows are padded
    to a multiple of BLOCK, and what is summed beyond one is left to MKL."""
    (rows, inner), columns = a.shape, b.shape[1]
    if rows > BLOCK and rows % BLOCK:
        whole = a.new_empty(rows + BLOCK - rows % BLOCK, inner)
        whole[:rows], whole[rows:] = a, 0
        return product(whole, b, bias)[:rows]
    if inner > BLOCK and inner % BLOCK:
        cut = inner - inner % BLOCK
        return product(a[:, :cut], b[:cut], bias).addmm_(a[:, cut:], b[cut:])
    # oneDNN copies a left matrix that is transposed, so the product is transposed instead if that copies less, as in the gradients of an
    # adapter's narrow matrices.
    if bias is None and not a.is_contiguous() and a.numel() > b.numel() + rows * columns:
        return onednn(b.t(), a, None).t().contiguous()
    return onednn(a, b.t(), bias if bias is None else bias.contiguous())


def onednn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return a b^T + bias."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(readable(a), readable(b), bias, "none", [], "")
    return result


def readable(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows or columns follow each other in memory. Others, such as parts of larger ones, oneDNN would multiply ten
    times slower, by its reference implementation, or refuse."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()
