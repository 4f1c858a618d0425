"""The one table of tolerances: relative RMS against a double-precision reference."""

from __future__ import annotations

import torch
from torch import Tensor

# Results are accumulated in fp32 and rounded once to the output dtype; bf16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.int8: 1e-5}


def relative_rms(y: Tensor, expected: Tensor) -> float:
    """‖y − expected‖ / ‖expected‖ in double precision; 0 for two empty or all-zero tensors."""
    y, expected = y.detach().double().cpu(), expected.detach().double().cpu()
    assert y.shape == expected.shape, (y.shape, expected.shape)
    if expected.norm() == 0:
        return float(y.norm())
    return float((y - expected).norm() / expected.norm())
