"""The row-scaled GEMV in groups of rows: against double precision, and as an operator."""

from __future__ import annotations

import pytest
import torch

from gathered import poison
from gnomon.kernels.rowscaled_linear import (
    GEMV_ROWS,
    quantize_rows,
    rowscaled_linear,
    rowscaled_linear_reference,
    rowscaled_linear_triton,
)
from tolerances import TOLERANCE, relative_rms

SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(1, 700, 256, id="tiles"),
    pytest.param(3, 17, 33, id="odd"),
    pytest.param(6, 40, 513, id="two-groups"),
    pytest.param(2, 5, 4300, id="past-a-block"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_kernel_in_double_precision(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, bias = torch.randn(m, k, device=device).to(dtype), torch.randn(n, device=device)
    q, scale = quantize_rows(torch.randn(n, k, device=device))
    expected = x.double() @ (q.double() * scale.double()[:, None]).T
    poison(m, n, device=device)
    y = rowscaled_linear_triton(x, q, scale, bias)
    assert y.dtype == dtype and relative_rms(y, expected + bias) < TOLERANCE[dtype]
    assert relative_rms(rowscaled_linear_triton(x, q, scale), expected) < TOLERANCE[dtype]


def test_a_wrong_scale_is_caught(device: torch.device) -> None:
    x, (q, scale) = torch.randn(2, 8, device=device), quantize_rows(torch.randn(4, 8))
    q, scale = q.to(device), scale.to(device)
    wrong = rowscaled_linear_triton(x, q, scale.flip(0))
    assert relative_rms(wrong, rowscaled_linear_reference(x, q, scale)) > 0.01


def test_registered_for_any_number_of_rows(device: torch.device) -> None:
    q, scale = (t.to(device) for t in quantize_rows(torch.randn(24, 40)))
    for shape in ((40,), (1, 1, 40), (GEMV_ROWS + 1, 40), (0, 40)):
        x = torch.randn(shape, device=device)
        y, expected = rowscaled_linear(x, q, scale), rowscaled_linear_reference(x, q, scale)
        assert y.shape == expected.shape and relative_rms(y, expected) < 1e-5
    torch.library.opcheck(rowscaled_linear, (torch.randn(2, 40, device=device), q, scale))
