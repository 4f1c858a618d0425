"""Column-gathered projection for batches beyond four: a matrix product on the tensor cores.

    y[b] = residual[b] + bias + Σ_{s, r} x[b, s·block + r] · scale[j] · weight_t[j],
    j = index[s]·block + r

with one list for the whole batch. Without a list, over all rows that some sequence wants (the
others are not read), or over all by a dense GEMM of the library. Specification:
``column_gather_reference``. Operands are rounded to the weights' dtype (beside int8 weights: to
x's), sums are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.launch import interpreted, pdl, power_of_two, processors, tickets
from gnomon.kernels.row_batch import operand_dtype
from gnomon.kernels.split_sums import at_once

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _reads, _rows
    from gnomon.kernels.split_sums import _addend, _joined
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

if triton is not None:

    @triton.jit
    def _column_dot_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        index_ptr,
        count_ptr,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        partial_ptr,
        ticket_ptr,
        wanted_ptr,
        B,
        S,
        D,
        before,
        UNIT: tl.constexpr,
        HAS_INDEX: tl.constexpr,
        HAS_COUNT: tl.constexpr,
        HAS_WANTED: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        UPCAST: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK_B: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        CHUNK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        held = S
        if HAS_COUNT:
            held = tl.load(count_ptr)
        rows = held * UNIT
        part = tl.cdiv(tl.cdiv(rows, SPLITS), ROWS) * ROWS
        begin = split * part
        end = tl.minimum(begin + part, rows)
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = b < B
        y = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
        for start in range(begin, end, ROWS):
            r = start + tl.arange(0, ROWS)
            live = _reads(r < end, r, wanted_ptr, before, UNIT, HAS_WANTED)
            row = _rows(r, end, index_ptr, 0, UNIT, HAS_INDEX).to(tl.int64)
            x = tl.load(
                x_ptr + b[:, None] * (S * UNIT) + r[None, :],
                mask=inside[:, None] & live[None, :],
                other=0.0,
            )
            if HAS_SCALE:
                scale = tl.load(scale_ptr + row, mask=live, other=0.0)
                x = (x.to(tl.float32) * scale[None, :]).to(x.dtype)
            w = tl.load(
                weight_ptr + row[:, None] * D + d[None, :],
                mask=live[:, None] & in_d[None, :],
                other=0.0,
            )
            if UPCAST:
                x = x.to(tl.float32)
            y = tl.dot(x, w.to(x.dtype), y, input_precision="ieee")
        column = d[None, :] + tl.zeros((BLOCK_B, 1), dtype=tl.int32)
        place = b[:, None] * D + column
        mask = inside[:, None] & in_d[None, :]
        last = True
        if SPLITS > 1:
            at = partial_ptr + b[:, None] * (SPLITS * D) + column
            tl.store(at + split * D, y, mask=mask)
            tl.debug_barrier()
            ticket = ticket_ptr + group * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(ticket, 0)
                y = _joined(at, mask, D, SPLITS, CHUNK)
            y += _addend(bias_ptr, column, mask, HAS_BIAS)
            y += _addend(residual_ptr, place, mask, HAS_RESIDUAL)
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


def columns_batch(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor | None,
    unit: int,
    count: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    wanted: Tensor | None = None,
) -> Tensor:
    """The sum over gathered rows of ``weight_t``, or all of them: x (B, S·unit) -> (B, D)."""
    x = x.to(operand_dtype(weight_t, x)).contiguous()
    if index is None and wanted is None and weight_t.dtype != torch.int8:
        dense = (x @ weight_t).float()
        dense = dense if bias is None else dense + bias.float()
        return (dense if residual is None else dense + residual.float()).to(out_dtype)
    batch, width = x.shape[0], weight_t.shape[1]
    slots = weight_t.shape[0] // unit if index is None else index.shape[-1]
    y = torch.empty((batch, width), dtype=out_dtype, device=x.device)
    block_b = min(64, max(16, power_of_two(batch)))
    rows, block_d = (64, 128) if x.dtype != torch.float32 else (32, 64)
    tiles = triton.cdiv(width, block_d) * triton.cdiv(batch, block_b)
    splits = max(1, min(16, 2 * processors(x.device) // tiles, -(-slots * unit // rows)))
    partial = y
    if splits > 1:
        partial = torch.empty((batch, splits, width), dtype=torch.float32, device=x.device)
    _column_dot_kernel[(triton.cdiv(width, block_d), splits, triton.cdiv(batch, block_b))](
        x,
        weight_t,
        index,
        count,
        scale,
        bias,
        residual,
        y,
        partial,
        tickets(x.device),
        wanted,
        batch,
        slots,
        width,
        0 if wanted is None else slots - wanted.numel(),
        UNIT=unit,
        HAS_INDEX=index is not None,
        HAS_COUNT=count is not None,
        HAS_WANTED=wanted is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        UPCAST=interpreted(),  # the interpreter's dot takes bf16 for integers
        SPLITS=splits,
        BLOCK_B=block_b,
        ROWS=rows,
        BLOCK_D=block_d,
        CHUNK=at_once(splits, block_b * block_d // 128),
        num_warps=4,
        num_stages=3,
        **pdl(x.device),
    )
    return y
