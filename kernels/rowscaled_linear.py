"""Linear layer with row-scaled int8 weights.

    y[m, n] = scale[n] · Σ_k x[m, k] · q[n, k] + bias[n]

x (M, K) floating point, q (N, K) int8, scale (N,) fp32, bias (N,) or none; y (M, N) in x's dtype,
accumulated in fp32. One scale per output row (a unit of a predictor, a neuron or head row of a
host), so that any subset of rows can be read without the others.

On a GPU up to 32 rows of x go through the GEMV: four of them share one pass over q, which every
thread loads 16 bytes at a time. More rows are a GEMM and take the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import cpu_gather
from gnomon.kernels.launch import pdl, power_of_two, processors
from gnomon.kernels.packed import packing, per_word, words

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.packed import _factors, _numbers, _products
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None

GEMV_ROWS = 32  # rows of x up to which the kernel is launched
WORDS_FROM = 4096  # outputs from which words pay for the sum of x that they need


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
        M,
        N,
        K: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        KIND: tl.constexpr,
        EACH: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """BLOCK_N outputs of ROWS rows of x, which share the weights' registers."""
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        first = tl.program_id(0) * ROWS
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        n64 = n.to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        WORDS: tl.constexpr = K // EACH
        BLOCK: tl.constexpr = BLOCK_K // EACH
        word = tl.arange(0, BLOCK)
        place = n64[:, None] * WORDS + word[None, :]
        mask = (n < N)[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (word < WORDS)[None, :]
        q = tl.load(q_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        w = _numbers(q, KIND)
        for m in tl.static_range(ROWS):
            row = tl.minimum(first + m, M - 1).to(tl.int64)  # past the last: computed, not stored
            x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
            if KIND == "int8":
                total = tl.sum(x, axis=0)
            y = tl.sum(_products(w, _factors(x, KIND, EACH), 0, EACH), axis=1)
            for start in tl.static_range(BLOCK_K, K, BLOCK_K):  # rows of more than a block
                inside = (n < N)[:, None] & (start // EACH + word < WORDS)[None, :]
                more = tl.load(q_ptr + place + start // EACH, mask=inside, other=0)
                x = tl.load(x_ptr + row * K + start + k, mask=start + k < K, other=0.0)
                x = x.to(tl.float32)
                if KIND == "int8":
                    total += tl.sum(x, axis=0)
                numbers = _numbers(more, KIND)
                y += tl.sum(_products(numbers, _factors(x, KIND, EACH), 0, EACH), axis=1)
            if KIND == "int8":
                y = y * 2.0**85 - 128.0 * total
            y *= scale
            if HAS_BIAS:
                y += bias
            end = tl.where(first + m < M, N, 0)
            tl.store(y_ptr + row * N + n64, y.to(y_ptr.dtype.element_ty), mask=n < end)


def rowscaled_linear_triton(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Launches the GEMV, any number of rows of x; same arguments and result as the reference."""
    n, k = q.shape
    rows = x.reshape(-1, k).contiguous()
    y = torch.empty((rows.shape[0], n), dtype=x.dtype, device=x.device)
    if y.numel():
        together = min(4, power_of_two(rows.shape[0]))
        q = q.contiguous()
        kind = packing(q) if n >= WORDS_FROM else "none"
        block_n, block_k, warps = _tiles(n, k, together, x.device)
        # Groups of rows are the fastest axis of the grid: they find their weights in the L2 cache.
        _rowscaled_gemv_kernel[(-(-rows.shape[0] // together), -(-n // block_n))](
            rows,
            words(q, kind),
            scale,
            bias,
            y,
            rows.shape[0],
            n,
            K=k,
            HAS_BIAS=bias is not None,
            KIND=kind,
            EACH=per_word(q, kind),
            ROWS=together,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            **pdl(x.device),
        )
    return y.reshape(*x.shape[:-1], n)


def _tiles(n: int, k: int, together: int, device: torch.device) -> tuple[int, int, int]:
    """Outputs and inputs of a tile, warps: 16 KiB in flight per program, 8 with rows to share.

    Few outputs take smaller tiles, down to one row, so that every processor has two programs.
    """
    block_k = min(4096, power_of_two(k))
    tile = 16384 if together == 1 else 8192
    block_n = max(1, tile // block_k)
    while block_n > 1 and -(-n // block_n) < 2 * processors(device):
        block_n //= 2
    return block_n, block_k, 8 if block_k >= 2048 else 4


def _rowscaled_linear_cuda(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    if x.numel() > GEMV_ROWS * q.shape[1]:
        return rowscaled_linear_reference(x, q, scale, bias)
    return rowscaled_linear_triton(x, q, scale, bias)


def _rowscaled_linear_cpu(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    if cpu_gather.serving(x.reshape(-1, x.shape[-1]), q) is None:
        return rowscaled_linear_reference(x, q, scale, bias)
    return cpu_gather.linear(x, q, bias, scale)


rowscaled_linear = torch.library.custom_op(
    "gnomon::rowscaled_linear", rowscaled_linear_reference, mutates_args=()
)
rowscaled_linear.register_kernel("cpu", _rowscaled_linear_cpu)
if triton is not None:
    rowscaled_linear.register_kernel("cuda", _rowscaled_linear_cuda)


@rowscaled_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))
