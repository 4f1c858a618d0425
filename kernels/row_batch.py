"""Row-gathered projections for batches beyond four: matrix products on the tensor cores.

    y[b, s·block + r] = scale[j] · Σ_k n(x)[b, k] · weight[j, k] + bias[j],   j = index[s]·block + r

or act(gate) · up of two such products, with one list for the whole batch. Without a list, all rows
that some sequence wants (the others are 0 and not read), or all by a dense GEMM of the library.
Specifications: ``row_gather_reference`` and ``ffn_up_reference``. Operands are rounded to the
weights' dtype (beside int8 weights: to x's), sums are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gnomon.kernels.gather_common import activate
from gnomon.kernels.launch import interpreted, pdl, power_of_two
from gnomon.kernels.norm_add import norm_add_triton

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate, _reads, _rows
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

if triton is not None:

    @triton.jit
    def _row_dot_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        up_ptr,
        gate_ptr,
        index_ptr,
        count_ptr,
        up_scale_ptr,
        gate_scale_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        wanted_ptr,
        y_ptr,
        B,
        S,
        W,
        before,
        UNIT: tl.constexpr,
        HAS_INDEX: tl.constexpr,
        HAS_COUNT: tl.constexpr,
        HAS_WANTED: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        GATED: tl.constexpr,
        ACTIVATION: tl.constexpr,
        UPCAST: tl.constexpr,
        BLOCK_B: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_W: tl.constexpr,
        PDL: tl.constexpr,
    ):
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        held = S
        if HAS_COUNT:
            held = tl.load(count_ptr)
        end = held * UNIT
        if tl.program_id(0) * ROWS < end:
            r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            live = r < end
            read = _reads(live, r, wanted_ptr, before, UNIT, HAS_WANTED)
            row = _rows(r, end, index_ptr, 0, UNIT, HAS_INDEX).to(tl.int64)
            b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
            inside = b < B
            up = tl.zeros((BLOCK_B, ROWS), dtype=tl.float32)
            gate = tl.zeros((BLOCK_B, ROWS), dtype=tl.float32)
            width = W
            if HAS_WANTED:  # a block without a wanted row is skipped
                width = W * tl.max(read.to(tl.int32), axis=0)
            for start in range(0, width, BLOCK_W):
                k = start + tl.arange(0, BLOCK_W)
                in_w = k < W
                x = tl.load(
                    x_ptr + b[:, None] * W + k[None, :],
                    mask=inside[:, None] & in_w[None, :],
                    other=0.0,
                )
                place = row[None, :] * W + k[:, None]
                mask = read[None, :] & in_w[:, None]
                if UPCAST:
                    x = x.to(tl.float32)
                w = tl.load(up_ptr + place, mask=mask, other=0.0).to(x.dtype)
                up = tl.dot(x, w, up, input_precision="ieee")
                if GATED:
                    g = tl.load(gate_ptr + place, mask=mask, other=0.0).to(x.dtype)
                    gate = tl.dot(x, g, gate, input_precision="ieee")
            if HAS_SCALE:
                up *= tl.load(up_scale_ptr + row, mask=read, other=0.0)[None, :]
            if HAS_BIAS:
                up += tl.load(up_bias_ptr + row, mask=read, other=0.0).to(tl.float32)[None, :]
            if GATED:
                if HAS_SCALE:
                    gate *= tl.load(gate_scale_ptr + row, mask=read, other=0.0)[None, :]
                if HAS_GATE_BIAS:
                    shift = tl.load(gate_bias_ptr + row, mask=read, other=0.0)
                    gate += shift.to(tl.float32)[None, :]
                up *= _activate(gate, ACTIVATION)
            else:
                up = _activate(up, ACTIVATION)
            tl.store(
                y_ptr + b[:, None] * (S * UNIT) + r[None, :],
                up.to(y_ptr.dtype.element_ty),
                mask=inside[:, None] & live[None, :],
            )


def rows_batch(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    index: Tensor | None,
    unit: int,
    count: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    out_dtype: torch.dtype,
    wanted: Tensor | None = None,
) -> Tensor:
    """Norm, then the product with gathered rows or all of them: x (B, W) -> (B, S·unit)."""
    x = norm_add_triton(x, norm_weight, norm_bias, norm, eps, None, operand_dtype(up, x))
    if index is None and wanted is None and up.dtype != torch.int8:
        y = _dense(x, up, biases[0])
        if gate is not None:
            y = activate(_dense(x, gate, biases[1]), activation) * y
        elif activation != "none":
            y = activate(y, activation)
        return y.to(out_dtype)
    batch, slots = x.shape[0], up.shape[0] // unit if index is None else index.shape[-1]
    y = torch.empty((batch, slots * unit), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_b = min(64, max(16, power_of_two(batch)))
    rows, block_w = 32, 128 if x.dtype != torch.float32 else 32
    _row_dot_kernel[(triton.cdiv(slots * unit, rows), triton.cdiv(batch, block_b))](
        x,
        up,
        up if gate is None else gate,
        index,
        count,
        *scales,
        *biases,
        wanted,
        y,
        batch,
        slots,
        x.shape[1],
        0 if wanted is None else slots - wanted.numel(),
        UNIT=unit,
        HAS_INDEX=index is not None,
        HAS_COUNT=count is not None,
        HAS_WANTED=wanted is not None,
        HAS_SCALE=scales[0] is not None,
        HAS_BIAS=biases[0] is not None,
        HAS_GATE_BIAS=biases[1] is not None,
        GATED=gate is not None,
        ACTIVATION=activation,
        UPCAST=interpreted(),  # the interpreter's dot takes bf16 for integers
        BLOCK_B=block_b,
        ROWS=rows,
        BLOCK_W=block_w,
        num_warps=4,
        num_stages=4,
        **pdl(x.device),
    )
    return y


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype)).float()


def operand_dtype(weight: Tensor, x: Tensor) -> torch.dtype:
    """What tensor cores multiply in: the weights' dtype, and x's where those are int8."""
    return x.dtype if weight.dtype == torch.int8 else weight.dtype
