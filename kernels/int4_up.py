"""Rows of int4 weights times x as a Triton launch: the first half of an FFN.

A matrix (N, W) is held as codes (N, ⌈W/32⌉·16) uint8, two a byte (the lower half first), and one
fp16 scale per 32 weights, (N, ⌈W/32⌉):

    w[j, k] = (code[j, k] − 8) · scale[j, k / 32]

A group of 32 lies in 16 bytes, four words (:mod:`gnomon.kernels.packed`), which one thread loads at
once. Specification: ``int4_ffn_up_reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.launch import pdl, power_of_two, processors

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
    from gnomon.kernels.packed import _field, _places, _power
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

if triton is not None:

    @triton.jit
    def _load_rows(  # type: ignore[no-untyped-def]
        codes_ptr, scale_ptr, n, N, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr
    ):
        """Words (ROWS, 4 · BLOCK_G), eight codes each, and scales (ROWS, BLOCK_G) of rows n."""
        word, g = tl.arange(0, 4 * BLOCK_G), tl.arange(0, BLOCK_G)
        row, live = n.to(tl.int64)[:, None] * GROUPS, (n < N)[:, None]
        mask = live & (word < 4 * GROUPS)[None, :]
        at = codes_ptr + 4 * row + word[None, :]
        words = tl.load(at, mask=mask, other=0, eviction_policy="evict_first")
        mask = live & (g < GROUPS)[None, :]
        return words, tl.load(scale_ptr + row + g[None, :], mask=mask, other=0.0)

    @triton.jit
    def _product(  # type: ignore[no-untyped-def]
        words, scale, xs, offset, ROWS: tl.constexpr, BLOCK_G: tl.constexpr
    ):
        """What sums to rows times x: words (ROWS, 4 · BLOCK_G), scale (ROWS, BLOCK_G)."""
        y = _field(words, 0, 4) * xs[0][None, :]
        for i in tl.static_range(1, 8):
            y += _field(words, i, 4) * xs[i][None, :]
        groups = tl.sum(tl.reshape(y, (ROWS, BLOCK_G, 4)), axis=2)
        return (groups * 2.0**85 - offset[None, :]) * scale.to(tl.float32)

    @triton.jit
    def _up_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        up_ptr,
        up_scale_ptr,
        gate_ptr,
        gate_scale_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        h_ptr,
        N,
        W: tl.constexpr,
        GROUPS: tl.constexpr,
        BLOCK_G: tl.constexpr,
        ROWS: tl.constexpr,
        GATED: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_UP_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Neurons of one sequence, ROWS at a time, x in registers and the next ones under way."""
        b = tl.program_id(1).to(tl.int64)
        step = tl.num_programs(0) * ROWS
        BLOCK: tl.constexpr = 4 * BLOCK_G
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        up, up_scale = _load_rows(up_ptr, up_scale_ptr, n, N, GROUPS, BLOCK_G)
        gate, gate_scale = up, up_scale
        if GATED:
            gate, gate_scale = _load_rows(gate_ptr, gate_scale_ptr, n, N, GROUPS, BLOCK_G)
        if PDL:  # the first weights are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        k = tl.arange(0, 8 * BLOCK)
        x = tl.load(x_ptr + b * W + k, mask=k < W, other=0.0).to(tl.float32)
        offset = 8.0 * tl.sum(tl.reshape(x, (BLOCK_G, 32)), axis=1)
        parts = _places(x * 2.0**64, 3)
        xs = ()
        for i in tl.static_range(8):
            xs += (parts[i] * _power(i, 4),)  # type: ignore[assignment]
        for start in range(tl.program_id(0) * ROWS, N, step):
            now, u, us, g, gs = n, up, up_scale, gate, gate_scale
            n = start + step + tl.arange(0, ROWS)
            up, up_scale = _load_rows(up_ptr, up_scale_ptr, n, N, GROUPS, BLOCK_G)
            gate, gate_scale = up, up_scale
            if GATED:
                gate, gate_scale = _load_rows(gate_ptr, gate_scale_ptr, n, N, GROUPS, BLOCK_G)
            y = _product(u, us, xs, offset, ROWS, BLOCK_G)
            if GATED:  # one sum across threads for both
                both = tl.join(y, _product(g, gs, xs, offset, ROWS, BLOCK_G))
                y, z = tl.split(tl.sum(both, axis=1))
            else:
                y = tl.sum(y, axis=1)
            if HAS_UP_BIAS:
                y += tl.load(up_bias_ptr + now, mask=now < N, other=0.0).to(tl.float32)
            if GATED:
                if HAS_GATE_BIAS:
                    z += tl.load(gate_bias_ptr + now, mask=now < N, other=0.0).to(tl.float32)
                y *= _activate(z, ACTIVATION)
            else:
                y = _activate(y, ACTIVATION)
            tl.store(h_ptr + b * N + now, y, mask=now < N)


def launch_up(
    x: Tensor,
    up: Tensor,
    up_scale: Tensor,
    gate: Tensor | None,
    gate_scale: Tensor | None,
    activation: str,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
) -> Tensor:
    """h (B, N) fp32 of x (B, W); checked arguments."""
    (batch, width), (n, groups) = x.shape, up_scale.shape
    h = torch.empty((batch, n), dtype=torch.float32, device=x.device)
    if h.numel() == 0:
        return h
    block = power_of_two(groups)
    rows, warps, programs = _up_tiles(n, block, x.device)
    _up_kernel[(programs, batch)](
        x.contiguous(),
        code_words(up),
        up_scale.contiguous(),
        None if gate is None else code_words(gate),
        *(None if t is None else t.contiguous() for t in (gate_scale, up_bias, gate_bias)),
        h,
        n,
        W=width,
        GROUPS=groups,
        BLOCK_G=block,
        ROWS=rows,
        GATED=gate is not None,
        ACTIVATION=activation,
        HAS_UP_BIAS=up_bias is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        num_warps=warps,
        **pdl(x.device),
    )
    return h


def code_words(codes: Tensor) -> Tensor:
    """Codes (N, 16 · groups) uint8 as words (N, 4 · groups) int32.

    Raises:
        ValueError: codes that begin at an address which is no multiple of four.
    """
    codes = codes.contiguous()
    if codes.data_ptr() % 4 or codes.storage_offset() % 4:
        raise ValueError("codes begin at an address that is no multiple of 4: give a copy of them")
    return codes.view(torch.int32)


def _up_tiles(n: int, block: int, device: torch.device) -> tuple[int, int, int]:
    """Rows of a block of ``block`` groups, warps, programs.

    8 KB of codes of a matrix and sixteen warps a processor. Short rows have no more warps than
    read different weights.
    """
    rows = max(1, min(4, 512 // block))
    warps = min(max(4, min(16, block // 32)), max(1, rows * block // 32))  # x: 64 registers at most
    return rows, warps, max(1, min(-(-n // rows), 16 // warps * processors(device)))
