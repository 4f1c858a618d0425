"""The norm on its own: reference against double precision, kernel against reference."""

from __future__ import annotations

import pytest
import torch

from gnomon.kernels.norm_add import norm_add, norm_add_reference, norm_add_triton
from tolerances import TOLERANCE, relative_rms


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("width", [1, 70, 300])
def test_norms(norm: str, width: int, device: torch.device) -> None:
    x, residual = torch.randn(3, width, device=device) + 1, torch.randn(3, width, device=device)
    gain, shift = torch.rand(width, device=device) + 0.5, torch.randn(width, device=device)
    z = x.double()
    if norm == "rms":
        z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if norm == "layer":
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    z = residual.double() + (z if norm == "none" else z * gain.double() + shift.double())
    for op in (norm_add_reference, norm_add_triton):
        y = op(x, gain, shift, norm, 1e-5, residual)
        assert relative_rms(y, z) < TOLERANCE[torch.float32]
        assert relative_rms(op(x, gain, shift, norm, 1e-5, None), z) > 1e-2
    low = norm_add_triton(x.bfloat16(), gain, shift, norm, 1e-5, residual, torch.bfloat16)
    assert low.dtype == torch.bfloat16 and relative_rms(low, z) < 2 * TOLERANCE[torch.bfloat16]


def test_registration(device: torch.device) -> None:
    x = torch.randn(2, 40, device=device)
    torch.library.opcheck(norm_add, (x, torch.ones(40, device=device)), {"residual": x.clone()})


def test_unknown_norm() -> None:
    for op in (norm_add_reference, norm_add_triton):
        with pytest.raises(ValueError, match="norm='group' is unknown"):
            op(torch.ones(1, 2), norm="group")
