"""The threshold GEMV on a CPU: the passing channels as lists for the C kernel of gathered columns.

    threshold_gemv    as in ``threshold_gemv.py``: same arguments, result and errors

The reference serves more than eight sequences, and machines without a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import cpu_gather
from gnomon.kernels.compact import select_passing_reference
from gnomon.kernels.threshold_gemv import check_tensors, epilogue, threshold_gemv_reference


def threshold_gemv(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    given: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`gnomon.kernels.threshold_gemv.threshold_gemv_reference`."""
    fused = (activation, given, residual)
    lib = cpu_gather.serving(x, weight_t)
    if lib is None:
        return threshold_gemv_reference(x, weight_t, threshold, bias, scale, out_dtype, *fused)
    check_tensors(x, weight_t, threshold, bias, scale, *fused)
    y = cpu_gather.columns(lib, x, weight_t, _list(x, threshold), scale, bias, None, whole=True)
    return epilogue(y, *fused).to(out_dtype or x.dtype)


def _list(x: Tensor, threshold: Tensor) -> cpu_gather.Lists:
    """The channels that pass; a CPU may be asked for the length of a single list."""
    if x.shape[0] == 1:
        return (x[0].float().abs() > threshold).nonzero()[:, 0].int(), 1, None
    index, count = select_passing_reference(x, threshold.view(1, -1), x.shape[1])
    return index, 1, count
