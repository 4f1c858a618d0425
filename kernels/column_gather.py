"""Column-gathered projection: the sum over chosen input channels of a linear, with its residual.

    y[b] = residual[b] + bias + Σ_{s, r} x[b, s·block + r] · scale[j] · weight_t[j],
    j = index[s]·block + r

x (B, S·block), compact in the order of the list; weight_t (N, D): row j is what input channel j
adds (the transpose of a linear's weight), fp32, fp16, bf16, or int8 with scale (N,); y (B, D). A
neuron is one row of a down projection, a head ``block`` = d rows of an out-projection. Without a
list x is (B, N) and every channel is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.column_gemv import launch_columns, triton
from gnomon.kernels.gather_common import check_list, rows_of, rows_wanted

__all__ = ["column_gather", "column_gather_reference", "column_gather_triton", "triton"]


def column_gather_reference(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """The specification, accumulated in fp32.

    Args:
        x: (B, S·block); past the count it is not read.
        weight_t: (N, D).
        index: (S,) or (B, S) int32, blocks of rows of ``weight_t``; None for all rows.
        block: rows per entry of the list.
        count: (1,) or (B,) entries that hold; None for all S.
        scale: (N,) fp32 of int8 weights.
        bias: (D,) or None.
        residual: (B, D) or None.
        out_dtype: of y; None takes x's.
        early, wanted: as in :func:`gnomon.kernels.row_gather.row_gather_reference`; x is not used
            where rows of ``weight_t`` are not read.

    Returns:
        (B, D).

    Raises:
        ValueError: a list that does not fit the batch.
    """
    check_list(index, count, x.shape[0], weight_t.shape[0] // block, wanted)
    x32 = x.float()
    if wanted is not None:
        read = rows_wanted(wanted, weight_t.shape[0], block)
        weight_t = torch.where(read[:, None], weight_t, 0)
        scale = None if scale is None else torch.where(read, scale, 0)
        y = _weigh(torch.where(read, x32, 0), weight_t, slice(None), scale)
    elif index is None:
        y = _weigh(x32, weight_t, slice(None), scale)
    else:
        if count is not None:
            held = torch.arange(x.shape[-1], device=x.device) < count[:, None] * block
            x32 = torch.where(held, x32, 0)
        rows = rows_of(index, block, count)
        if rows.dim() == 1 or rows.shape[0] == 1:
            y = _weigh(x32, weight_t, rows.flatten(), scale)
        else:
            y = torch.cat([_weigh(x32[b : b + 1], weight_t, r, scale) for b, r in enumerate(rows)])
        y = (
            y if count is None else torch.where(count[:, None] > 0, y, 0)
        )  # row 0 is then unselected
    y = y if bias is None else y + bias.float()
    y = y if residual is None else y + residual.float()
    return y.to(out_dtype or x.dtype)


def _weigh(x: Tensor, weight_t: Tensor, rows: Tensor | slice, scale: Tensor | None) -> Tensor:
    return (x if scale is None else x * scale[rows]) @ weight_t[rows].float()


def column_gather_triton(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    check_list(index, count, x.shape[0], weight_t.shape[0] // block, wanted)
    return launch_columns(
        x,
        weight_t,
        index,
        block,
        count,
        scale,
        bias,
        residual,
        out_dtype or x.dtype,
        early,
        wanted,
    )


column_gather = torch.library.custom_op(
    "gnomon::column_gather", column_gather_reference, mutates_args=()
)
column_gather.register_kernel("cuda", column_gather_triton)


@column_gather.register_fake
def _(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]), dtype=out_dtype or x.dtype)
