"""Linear layer with row-scaled int8 weights.

    y[m, n] = scale[n] · Σ_k x[m, k] · q[n, k] + bias[n]

x (M, K) floating point, q (N, K) int8, scale (N,) fp32, bias (N,) or none; y (M, N) in x's dtype,
accumulated in fp32. One scale per output row (a unit of a predictor, a neuron or head row of a
host), so that any subset of rows can be read without the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to int8 with its own scale; |error| <= scale / 2 per weight.

    Args:
        w: (..., N, K) floating point.

    Returns:
        q (..., N, K) int8 in [-127, 127], and scale (..., N) fp32 (1 for an all-zero row).
    """
    peak = w.detach().float().abs().amax(-1)
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    return (w.detach().float() / scale[..., None]).round().to(torch.int8), scale


def rowscaled_linear_reference(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The specification: y = (x qᵀ) · scale + bias.

    Args:
        x: (..., K).
        q: (N, K) int8.
        scale: (N,) fp32.
        bias: (N,) or None.

    Returns:
        (..., N) in x's dtype.
    """
    y = torch.nn.functional.linear(x.float(), q.float()) * scale
    return (y if bias is None else y + bias).to(x.dtype)


if triton is not None:

    @triton.jit
    def _rowscaled_gemv_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        q_ptr,
        scale_ptr,
        bias_ptr,
        y_ptr,
        N,
        K,
        HAS_BIAS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        row = tl.program_id(1).to(tl.int64)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        n64 = n.to(tl.int64)
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
            inside = (n[:, None] < N) & (k[None, :] < K)
            q = tl.load(q_ptr + n64[:, None] * K + k[None, :], mask=inside, other=0)
            acc += tl.sum(q.to(tl.float32) * x[None, :], axis=1)
        y = acc * tl.load(scale_ptr + n, mask=n < N, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + n64, y.to(y_ptr.dtype.element_ty), mask=n < N)


def rowscaled_linear_triton(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Launches one GEMV per row of x; same arguments and result as the reference."""
    n, k = q.shape
    rows = x.reshape(-1, k).contiguous()
    y = torch.empty((rows.shape[0], n), dtype=x.dtype, device=x.device)
    if y.numel():
        block_n, block_k = 16, min(512, triton.next_power_of_2(k))
        _rowscaled_gemv_kernel[(triton.cdiv(n, block_n), rows.shape[0])](
            rows,
            q.contiguous(),
            scale,
            scale if bias is None else bias,
            y,
            n,
            k,
            HAS_BIAS=bias is not None,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return y.reshape(*x.shape[:-1], n)


def rowscaled_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row-scaled linear as predictors use it: the reference, on every device.

    The kernel is launched by :func:`rowscaled_linear_triton` alone, so that quality never depends
    on which of the two a device happens to take.

    Args:
        x: (..., K).
        q: (N, K) int8.
        scale: (N,) fp32.
        bias: (N,) or None.

    Returns:
        (..., N) in x's dtype.
    """
    return rowscaled_linear_reference(x, q, scale, bias)
