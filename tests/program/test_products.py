"""Float32 products by oneDNN equal torch's, for all shapes and strides; torch's own are replaced only where its MKL is held back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import save_pico

from tasks.models import products
from tasks.models.loading import load_model
from tuneline.workspace.protocol import Input

SIZES = st.sampled_from([0, 1, 2, 3, 17, 32, 33, 70])
LAYOUTS = st.one_of(
    st.sampled_from(["rows", "columns"]),
    st.tuples(st.integers(0, 50), st.integers(0, 7), st.integers(0, 40)),  # strides, of which 0 is expanded; offset
)


def matrix(rows: int, columns: int, layout: str | tuple[int, int, int]) -> torch.Tensor:
    values = torch.randn(8000)
    if isinstance(layout, tuple):
        return values.as_strided((rows, columns), layout[:2], layout[2])
    return values[: rows * columns].view(rows, columns) if layout == "rows" else values[: rows * columns].view(columns, rows).t()


@settings(deadline=None)
@given(
    st.tuples(SIZES, SIZES, SIZES), LAYOUTS, LAYOUTS, st.sampled_from(["row", "every other", "column", "whole"]), st.sampled_from([1, 0.5])
)
def test_products_are_right(size: tuple[int, int, int], left: str, right: str, added: str, alpha: float) -> None:
    rows, inner, columns = size
    a, b = matrix(rows, inner, left), matrix(inner, columns, right)
    whole = matrix(rows, columns, "rows")
    c = {"row": torch.randn(columns), "every other": torch.randn(2 * columns)[::2], "column": torch.randn(rows, 1), "whole": whole}[added]
    exact = a.double() @ b.double()
    for found, expected in (
        (products.mm(a, b), exact),
        (products.addmm(c, a, b, alpha=alpha), c.double() + alpha * exact),
        (products.addmm(c, a, b, beta=0.5), 0.5 * c.double() + exact),
    ):
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_narrow_gradients_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN copies a left matrix that is transposed: for an adapter's gradient the larger one would be."""
    lefts: list[int] = []
    real = products.onednn
    monkeypatch.setattr(products, "onednn", lambda a, b, bias: lefts.append(a.numel()) or real(a, b, bias))
    gradient, narrow, wide = torch.randn(32, 288), torch.randn(32, 8), torch.randn(32, 200)
    for right in (narrow, wide):
        torch.testing.assert_close(products.mm(gradient.t(), right), torch.einsum("kr,kc->rc", gradient, right), atol=1e-4, rtol=1e-4)
    assert lefts == [narrow.numel(), gradient.numel()]


def test_lengths_of_micro_batches_share_the_code_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps megabytes for each shape: a gigabyte after some hundred lengths."""
    shapes: set[tuple[torch.Size, torch.Size]] = set()
    real = products.onednn
    monkeypatch.setattr(products, "onednn", lambda a, b, bias: shapes.add((a.shape, b.shape)) or real(a, b, bias))
    weight = torch.randn(48, 64)
    for tokens in range(products.BLOCK, 300):
        rows = torch.randn(tokens, 64)
        products.mm(rows, weight.t())
        products.mm(rows.t(), torch.randn(tokens, 16))
    assert len(shapes) <= 2 * (300 // products.BLOCK + 1)


SCRIPT = """
import torch
if {replaced}:
    from tasks.models import products
    products.replace()
a, layer = torch.randn(3, 4, 33, requires_grad=True), torch.nn.Linear(33, 17)
layer(a).square().sum().backward()
assert a.grad.shape == a.shape
assert (torch.randint(5, (4, 3)) @ torch.randint(5, (3, 4))).dtype == torch.int64
assert (a.double() @ layer.weight.double().t()).dtype == torch.float64
matrix = torch.randn(2, 3)
for wrong in (
    lambda: torch.mm(matrix, torch.randn(4, 5)), lambda: torch.mm(matrix, torch.randn(3, 5).double()), lambda: torch.mm(matrix, matrix[0]),
    lambda: torch.addmm(matrix[0], matrix, matrix[0]), lambda: torch.addmm(torch.ones(5).double(), matrix, torch.randn(3, 5)),
):
    try:
        wrong()
    except Exception as error:
        print("refused:", type(error).__name__, error)
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")
def test_torch_multiplies_by_onednn_only_when_told() -> None:
    """If this fails for torch's own products, they no longer need a replacement: docs/patches.md."""
    printed = {}
    for replaced in (False, True):
        environment = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONWARNINGS": "error"}
        command = [sys.executable, "-c", SCRIPT.format(replaced=replaced)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        by_onednn = [line for line in lines if ",exec," in line and ("inner_product" in line or "matmul" in line)]
        assert len(by_onednn) == (3 if replaced else 0), done.stdout  # forward, and both gradients
        assert not any(",ref:" in line for line in by_onednn), "its reference implementation is slow"
        printed[replaced] = [line for line in lines if line.startswith("refused: ")]
    assert printed[True] == printed[False]
    assert len(printed[True]) == 5


@pytest.mark.parametrize(("maker", "capability", "expected"), [
    ("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False),
])  # fmt: skip
def test_torchs_own_products_stay_where_they_are_as_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maker: str, capability: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(products, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.held_back() is (expected and torch.backends.mkl.is_available())
    monkeypatch.setattr(products, "CPU_INFO", tmp_path / "absent")  # on other systems
    assert not products.held_back()


def test_loading_a_model_replaces_slow_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replaced: list[bool] = []
    monkeypatch.setattr(products, "held_back", lambda: True)
    monkeypatch.setattr(products, "replace", lambda: replaced.append(True))
    load_model(Input(path=save_pico(tmp_path / "model"), digest="", type="Model"), torch.float32)
    assert replaced
