"""Row-scaled int8 linear: error bound, reference, and the Triton kernel in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gnomon.kernels.rowscaled_linear import (
    quantize_rows,
    rowscaled_linear,
    rowscaled_linear_reference,
)

SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(3, 17, 33, id="odd"),
    pytest.param(16, 130, 513, id="past-blocks"),
    pytest.param(0, 8, 16, id="no-rows"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def relative_rms(y: torch.Tensor, expected: torch.Tensor) -> float:
    """‖y − expected‖ / ‖expected‖ in double precision."""
    return ((y.double() - expected).norm() / expected.norm()).item()


def test_quantize_rows_keeps_half_a_step() -> None:
    w = torch.randn(2, 5, 64) * torch.logspace(-3, 2, 5)[:, None]
    w[0, 0] = 0
    q, scale = quantize_rows(w)
    assert q.dtype == torch.int8 and scale.shape == (2, 5)
    error = (q.float() * scale[..., None] - w).abs()
    assert (error <= scale[..., None] * 0.5001).all()
    assert q[0, 0].eq(0).all() and scale[0, 0] == 1


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_dequantised_product(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k), torch.randn(n)
    q, scale = quantize_rows(w)
    y = rowscaled_linear(x, q, scale, bias)
    expected = x.double() @ (q.double() * scale.double()[:, None]).T + bias
    assert y.dtype == dtype and y.shape == (m, n)
    if m:
        assert relative_rms(y, expected) < TOLERANCE[dtype]
        assert (
            relative_rms(rowscaled_linear_reference(x, q, scale), expected - bias)
            < TOLERANCE[dtype]
        )


INTERPRETED = """
import torch
from gnomon.kernels.rowscaled_linear import *
torch.manual_seed(0)
for m, n, k in [(1, 1, 1), (3, 17, 33), (2, 130, 513), (0, 8, 16)]:
    for bias in (torch.randn(n), None):
        x, (q, scale) = torch.randn(m, k), quantize_rows(torch.randn(n, k))
        y = rowscaled_linear_triton(x, q, scale, bias)
        torch.testing.assert_close(y, rowscaled_linear_reference(x, q, scale, bias))
wrong = rowscaled_linear_triton(x := torch.randn(2, 8), q := quantize_rows(torch.randn(4, 8))[0],
                                torch.full((4,), 2.0))
assert not torch.allclose(wrong, rowscaled_linear_reference(x, q, torch.ones(4)))
print("same")
"""


def test_triton_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.replace("import *", IMPORTS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


IMPORTS = "import quantize_rows, rowscaled_linear_reference, rowscaled_linear_triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_kernel_on_cuda(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda")
    q, scale = quantize_rows(w)
    bias = torch.randn(n, device="cuda")
    y = rowscaled_linear(x, q, scale, bias)
    expected = x.double() @ (q.double() * scale.double()[:, None]).T + bias
    if m:
        assert relative_rms(y, expected) < TOLERANCE[dtype]
