"""Row-gathered projection: chosen rows of a linear, with the norm before it fused.

    y[b, s·block + r] = scale[j] · Σ_k n(x)[b, k] · weight[j, k] + bias[j],   j = index[s]·block + r

x (B, W); weight (N, W) fp32, fp16, bf16, or int8 with scale (N,); y (B, S·block), compact in the
order of the list. n is the identity, an RMS norm or a layer norm. A head is ``block`` = d rows of a
q projection (or of fused q, k, v rows), a neuron one row. Without a list every row is computed.
The RMS norm commutes with the product, so its sum of squares costs no second pass over x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gnomon.kernels.gather_common import (
    NORMS,
    check_choice,
    check_list,
    normalise,
    rows_of,
    rows_wanted,
)
from gnomon.kernels.row_gemv import launch_rows, triton

__all__ = ["row_gather", "row_gather_reference", "row_gather_triton", "triton"]


def row_gather_reference(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """The specification, accumulated in fp32.

    Args:
        x: (B, W).
        weight: (N, W).
        index: (S,) or (B, S) int32, blocks of rows; None for all rows.
        block: rows per entry of the list.
        count: (1,) or (B,) entries that hold; None for all S.
        scale: (N,) fp32 of int8 weights.
        bias: (N,) or None.
        norm_weight, norm_bias: (W,) of the fused norm.
        norm: ``none``, ``rms`` or ``layer``.
        eps: of the norm.
        out_dtype: of y; None takes x's.
        early: promises that the list was complete before the launch that precedes this one, so
            that weights may be fetched while that one drains; changes no result.
        wanted: (M,) bool, without a list: of the last M blocks those that are read, the rows of
            the others being 0. None reads all.

    Returns:
        (B, S·block); what lies past the count is undefined.

    Raises:
        ValueError: unknown norm, or a list that does not fit the batch.
    """
    check_choice("norm", norm, NORMS)
    check_list(index, count, x.shape[0], weight.shape[0] // block, wanted)
    x32 = normalise(x, norm, norm_weight, norm_bias, eps)
    if index is None:
        y = _affine(x32, weight, slice(None), scale, bias)
        if wanted is not None:
            y = torch.where(rows_wanted(wanted, weight.shape[0], block), y, 0)
    else:
        rows = rows_of(index, block, count)
        if rows.dim() == 1 or rows.shape[0] == 1:
            y = _affine(x32, weight, rows.flatten(), scale, bias)
        else:
            y = torch.cat(
                [_affine(x32[b : b + 1], weight, r, scale, bias) for b, r in enumerate(rows)]
            )
    return y.to(out_dtype or x.dtype)


def _affine(
    x: Tensor, weight: Tensor, rows: Tensor | slice, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    y = F.linear(x, weight[rows].float())
    y = y if scale is None else y * scale[rows]
    return y if bias is None else y + bias[rows].float()


def row_gather_triton(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    check_choice("norm", norm, NORMS)
    check_list(index, count, x.shape[0], weight.shape[0] // block, wanted)
    return launch_rows(
        x,
        weight,
        None,
        index,
        block,
        count,
        (scale, None),
        (bias, None),
        norm_weight,
        norm_bias,
        norm,
        eps,
        "none",
        out_dtype or x.dtype,
        early,
        wanted,
    )


row_gather = torch.library.custom_op("gnomon::row_gather", row_gather_reference, mutates_args=())
row_gather.register_kernel("cuda", row_gather_triton)


@row_gather.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    rows = weight.shape[0] if index is None else index.shape[-1] * block
    return x.new_empty((x.shape[0], rows), dtype=out_dtype or x.dtype)
