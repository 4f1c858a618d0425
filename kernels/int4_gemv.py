"""Products with int4 weights of 32 to a scale as Triton launches: rows of a FFN, and their sum.

A matrix (N, W) is held as codes (N, ⌈W/32⌉·16) uint8, two a byte (the lower half first), and one
fp16 scale per 32 weights, (N, ⌈W/32⌉):

    w[j, k] = (code[j, k] − 8) · scale[j, k / 32]

Specification: :mod:`gnomon.kernels.int4_ffn`. A group of 32 lies in 16 bytes, which one thread
loads at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.launch import pdl, power_of_two, processors, tickets

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

if triton is not None:

    @triton.jit
    def _load_codes(codes_ptr, n, in_n, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
        """Codes (ROWS, 16 · BLOCK_G) of rows n."""
        place = tl.arange(0, 16 * BLOCK_G)
        mask = in_n[:, None] & (place < 16 * GROUPS)[None, :]
        at = n.to(tl.int64)[:, None] * (16 * GROUPS) + place[None, :]
        return tl.load(codes_ptr + at, mask=mask, other=0, eviction_policy="evict_first")

    @triton.jit
    def _load_scales(scale_ptr, n, in_n, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
        g = tl.arange(0, BLOCK_G)
        mask = in_n[:, None] & (g < GROUPS)[None, :]
        return tl.load(
            scale_ptr + n.to(tl.int64)[:, None] * GROUPS + g[None, :], mask=mask, other=0.0
        )

    @triton.jit
    def _low(codes):  # type: ignore[no-untyped-def]
        """Lower halves less 8, fp32: set into the mantissa of 2²³, which costs no conversion."""
        return ((codes.to(tl.int32) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0

    @triton.jit
    def _high(codes):  # type: ignore[no-untyped-def]
        return ((codes.to(tl.int32) >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0

    @triton.jit
    def _product(codes, scale, even, odd, ROWS: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows times x: codes (ROWS, 16 · BLOCK_G), scale (ROWS, BLOCK_G) -> (ROWS,)."""
        sums = _low(codes) * even[None, :] + _high(codes) * odd[None, :]
        groups = tl.sum(tl.reshape(sums, (ROWS, BLOCK_G, 16)), axis=2)
        return tl.sum(groups * scale.to(tl.float32), axis=1)

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
        """ROWS neurons of one sequence."""
        b = tl.program_id(1)
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        in_n = n < N
        up = _load_codes(up_ptr, n, in_n, GROUPS, BLOCK_G)
        up_scale = _load_scales(up_scale_ptr, n, in_n, GROUPS, BLOCK_G)
        if GATED:
            gate = _load_codes(gate_ptr, n, in_n, GROUPS, BLOCK_G)
            gate_scale = _load_scales(gate_scale_ptr, n, in_n, GROUPS, BLOCK_G)
        if PDL:  # the weights are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        pair = tl.arange(0, 16 * BLOCK_G) * 2
        row = x_ptr + b.to(tl.int64) * W
        even = tl.load(row + pair, mask=pair < W, other=0.0).to(tl.float32)
        odd = tl.load(row + pair + 1, mask=pair + 1 < W, other=0.0).to(tl.float32)
        y = _product(up, up_scale, even, odd, ROWS, BLOCK_G)
        if HAS_UP_BIAS:
            y += tl.load(up_bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        if GATED:
            z = _product(gate, gate_scale, even, odd, ROWS, BLOCK_G)
            if HAS_GATE_BIAS:
                z += tl.load(gate_bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
            y *= _activate(z, ACTIVATION)
        else:
            y = _activate(y, ACTIVATION)
        tl.store(h_ptr + b.to(tl.int64) * N + n, y, mask=in_n)

    @triton.jit
    def _load_part(  # type: ignore[no-untyped-def]
        codes_ptr, scale_ptr, j, end, place, g, GROUPS: tl.constexpr
    ):
        """Codes (ROWS, UNROLL, 16 · BLOCK_G) and scales (ROWS, UNROLL, BLOCK_G) of rows j."""
        at, live = j.to(tl.int64)[:, :, None] * GROUPS, (j < end)[:, :, None]
        mask = live & (place < 16 * GROUPS)[None, None, :]
        codes = tl.load(
            codes_ptr + 16 * at + place[None, None, :],
            mask=mask,
            other=0,
            eviction_policy="evict_first",
        )
        mask = live & (g < GROUPS)[None, None, :]
        scale = tl.load(scale_ptr + at + g[None, None, :], mask=mask, other=0.0)
        return codes, scale.to(tl.float32)

    @triton.jit
    def _down_kernel(  # type: ignore[no-untyped-def]
        h_ptr,
        codes_ptr,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        partial_ptr,
        ticket_ptr,
        N,
        D: tl.constexpr,
        GROUPS: tl.constexpr,
        SPLITS: tl.constexpr,
        UNROLL: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_G: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """A tile of 32 · BLOCK_G outputs of one sequence over one of SPLITS parts of the rows.

        The last part sums. The next UNROLL x ROWS rows are under way while as many are summed.
        """
        tile, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        STEP: tl.constexpr = UNROLL * ROWS
        WIDE: tl.constexpr = 16 * BLOCK_G
        part = tl.cdiv(tl.cdiv(N, SPLITS), STEP) * STEP
        begin = split * part
        end = tl.minimum(begin + part, N)
        g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
        place = tile * WIDE + tl.arange(0, WIDE)
        lane = tl.arange(0, ROWS)[:, None] + tl.arange(0, UNROLL)[None, :] * ROWS
        j = begin + lane
        codes, scale = _load_part(codes_ptr, scale_ptr, j, end, place, g, GROUPS)
        if PDL:  # the first weights are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        even = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        odd = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        for start in range(begin, end, STEP):
            h = tl.load(h_ptr + b * N + j, mask=j < end, other=0.0)
            now, factor = codes, h[:, :, None] * scale
            j = start + STEP + lane
            codes, scale = _load_part(codes_ptr, scale_ptr, j, end, place, g, GROUPS)
            factor = tl.broadcast_to(factor[:, :, :, None], (ROWS, UNROLL, BLOCK_G, 16))
            factor = tl.reshape(factor, (ROWS, UNROLL, WIDE))
            even += tl.sum(_low(now) * factor, axis=1)
            odd += tl.sum(_high(now) * factor, axis=1)
        low, high = tl.sum(even, axis=0), tl.sum(odd, axis=0)
        d = 2 * place
        in_low, in_high = d < D, d + 1 < D
        last = True
        if SPLITS > 1:
            own = partial_ptr + (b * SPLITS + split) * D + d
            tl.store(own, low, mask=in_low)
            tl.store(own + 1, high, mask=in_high)
            tl.debug_barrier()
            ticket = ticket_ptr + tl.program_id(2) * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(ticket, 0)
                low = tl.zeros((WIDE,), dtype=tl.float32)
                high = tl.zeros((WIDE,), dtype=tl.float32)
                for s in range(SPLITS):
                    own = partial_ptr + (b * SPLITS + s) * D + d
                    low += tl.load(own, mask=in_low, other=0.0, cache_modifier=".cg")
                    high += tl.load(own + 1, mask=in_high, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                low += tl.load(bias_ptr + d, mask=in_low, other=0.0).to(tl.float32)
                high += tl.load(bias_ptr + d + 1, mask=in_high, other=0.0).to(tl.float32)
            row = b * D + d
            if HAS_RESIDUAL:
                low += tl.load(residual_ptr + row, mask=in_low, other=0.0).to(tl.float32)
                high += tl.load(residual_ptr + row + 1, mask=in_high, other=0.0).to(tl.float32)
            tl.store(y_ptr + row, low, mask=in_low)
            tl.store(y_ptr + row + 1, high, mask=in_high)


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
    warps = max(1, min(8, block // 16))
    rows = max(1, min(8, warps * 128 // block))
    _up_kernel[(-(-n // rows), batch)](
        x.contiguous(),
        *(
            None if t is None else t.contiguous()
            for t in (up, up_scale, gate, gate_scale, up_bias, gate_bias)
        ),
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


def launch_down(
    h: Tensor,
    down: Tensor,
    scale: Tensor,
    width: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y (B, D) fp32 of h (B, N); checked arguments."""
    batch, (n, groups) = h.shape[0], scale.shape
    y = torch.empty((batch, width), dtype=torch.float32, device=h.device)
    if y.numel() == 0:
        return y
    block = min(8, power_of_two(groups))  # a warp reads 128 bytes of four rows at once
    warps, unroll, rows = 4, 4, 16
    tiles = -(-groups // block)
    splits = max(1, min(64, 4 * processors(h.device) // (tiles * batch), -(-n // (unroll * rows))))
    partial = y
    if splits > 1:
        partial = torch.empty((batch, splits, width), dtype=torch.float32, device=h.device)
    _down_kernel[(tiles, splits, batch)](
        *(None if t is None else t.contiguous() for t in (h, down, scale, bias, residual)),
        y,
        partial,
        tickets(h.device),
        n,
        D=width,
        GROUPS=groups,
        SPLITS=splits,
        UNROLL=unroll,
        ROWS=rows,
        BLOCK_G=block,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=warps,
        **pdl(h.device),
    )
    return y
