"""Threshold products on a CPU: the passing channels as lists for the C kernel of gathered columns.

    threshold_gemv    as in ``threshold_gemv.py``: same arguments, result and errors
    threshold_ffn     as in ``threshold_ffn.py``, whose channels are listed once

The reference serves more than eight sequences, and machines without a compiler.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from gnomon.kernels import cpu_gather
from gnomon.kernels.compact import select_passing_reference
from gnomon.kernels.gather_common import activate
from gnomon.kernels.threshold_ffn import check_pair, threshold_ffn_reference
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
    lists, own = _list(lib, x, threshold), activation == "none" and given is None
    y = cpu_gather.columns(lib, x, weight_t, lists, scale, bias, residual if own else None, True)
    return (y if own else epilogue(y, *fused)).to(out_dtype or x.dtype)


def threshold_ffn(
    x: Tensor,
    up_t: Tensor,
    gate_t: Tensor,
    threshold: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As :func:`gnomon.kernels.threshold_ffn.threshold_ffn_reference`."""
    check_pair(x, up_t, gate_t, threshold, activation, up_bias, gate_bias)
    lib = cpu_gather.serving(x, up_t)
    if lib is None:
        own = (activation, up_bias, gate_bias, out_dtype)
        return threshold_ffn_reference(x, up_t, gate_t, threshold, *own)
    lists = _list(lib, x, threshold)
    up, gate = (
        cpu_gather.columns(lib, x, weight_t, lists, None, bias, None, True)
        for weight_t, bias in ((up_t, up_bias), (gate_t, gate_bias))
    )
    return (activate(gate, activation) * up).to(out_dtype or x.dtype)


def _list(lib: CDLL, x: Tensor, threshold: Tensor) -> cpu_gather.Lists:
    """The channels that pass; a CPU may be asked for the length of a single list."""
    if x.shape[0] == 1 and threshold.numel() == 1:
        found = torch.empty(x.shape[1], dtype=torch.int32)
        held: list[Tensor] = []
        where = cpu_gather.address_fp32(x, held)
        count = lib.gnomon_passing(where, float(threshold), x.shape[1], found.data_ptr())
        return found[:count], 1, None
    if x.shape[0] == 1:
        return (x[0].float().abs() > threshold).nonzero()[:, 0].int(), 1, None
    index, count = select_passing_reference(x, threshold.view(1, -1), x.shape[1])
    return index, 1, count
