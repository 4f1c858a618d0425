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

    from gnomon.kernels.column_words import _finish, _joined
    from gnomon.kernels.gather_common import _activate
    from gnomon.kernels.packed import _field, _places, _power, _woven
    from gnomon.kernels.sketch_gemv import _zeros
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

STAGES = 3  # of the down projection's pipeline

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

    @triton.jit
    def _load_part(  # type: ignore[no-untyped-def]
        codes_ptr, scale_ptr, j, end, word, g, GROUPS: tl.constexpr
    ):
        """Words (ROWS, UNROLL, 4 · BLOCK_G) and scales (ROWS, UNROLL, BLOCK_G) of rows j."""
        at, live = j.to(tl.int64)[:, :, None] * GROUPS, (j < end)[:, :, None]
        mask = live & (word < 4 * GROUPS)[None, None, :]
        words = tl.load(
            codes_ptr + 4 * at + word[None, None, :],
            mask=mask,
            other=0,
            eviction_policy="evict_first",
        )
        mask = live & (g < GROUPS)[None, None, :]
        scale = tl.load(scale_ptr + at + g[None, None, :], mask=mask, other=0.0)
        return words, scale.to(tl.float32)

    @triton.jit
    def _added(  # type: ignore[no-untyped-def]
        sums,
        offset,
        words,
        scale,
        h_ptr,
        j,
        end,
        ROWS: tl.constexpr,
        UNROLL: tl.constexpr,
        BLOCK_G: tl.constexpr,
    ):
        """Sums (ROWS, 4 · BLOCK_G) of every place in a word, and of offsets, with rows j more."""
        h = tl.load(h_ptr + j, mask=j < end, other=0.0)
        factor = h[:, :, None] * scale
        offset += 8.0 * tl.sum(factor, axis=1)
        factor = tl.broadcast_to((factor * 2.0**64)[:, :, :, None], (ROWS, UNROLL, BLOCK_G, 4))
        factor = tl.reshape(factor, (ROWS, UNROLL, 4 * BLOCK_G))
        found = ()
        for i in tl.static_range(8):
            found += (sums[i] + tl.sum(_field(words, i, 4) * factor, axis=1),)  # type: ignore[assignment]
        return found, offset

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
        CHUNK: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        STAGES: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """A tile of 32 · BLOCK_G outputs of one sequence over one of SPLITS parts of the rows.

        The last part sums. UNROLL x ROWS rows at a time: the first ones are asked for before the
        launch before has ended and are summed last, the others go through shared memory, STAGES - 1
        times as many under way.
        """
        tile, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        STEP: tl.constexpr = UNROLL * ROWS
        BLOCK: tl.constexpr = 4 * BLOCK_G
        part = tl.cdiv(tl.cdiv(N, SPLITS), STEP) * STEP
        begin = split * part
        end = tl.minimum(begin + part, N)
        g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
        word = tile * BLOCK + tl.arange(0, BLOCK)
        lane = tl.arange(0, ROWS)[:, None] + tl.arange(0, UNROLL)[None, :] * ROWS
        j = begin + lane
        words, scale = _load_part(codes_ptr, scale_ptr, j, end, word, g, GROUPS)
        if PDL:  # the first weights are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        sums = _zeros(8, (ROWS, BLOCK))
        offset = tl.zeros((ROWS, BLOCK_G), dtype=tl.float32)
        h_ptr += b.to(tl.int64) * N
        for start in tl.range(begin + STEP, end, STEP, num_stages=STAGES):
            here = start + lane
            w, ws = _load_part(codes_ptr, scale_ptr, here, end, word, g, GROUPS)
            sums, offset = _added(sums, offset, w, ws, h_ptr, here, end, ROWS, UNROLL, BLOCK_G)
        sums, offset = _added(sums, offset, words, scale, h_ptr, j, end, ROWS, UNROLL, BLOCK_G)
        parts = ()
        for i in tl.static_range(8):
            parts += (sums[i] * (2.0**85 * _power(i, 4)),)  # type: ignore[assignment]
        less = tl.broadcast_to(tl.sum(offset, axis=0)[:, None], (BLOCK_G, 32))
        y = tl.sum(_woven(parts), axis=0) - tl.reshape(less, (8 * BLOCK,))
        d = tile * (8 * BLOCK) + tl.arange(0, 8 * BLOCK)
        epilogue = bias_ptr, residual_ptr, y_ptr, b, tl.num_programs(2), d
        if SPLITS == 1:
            _finish(y, *epilogue, D, HAS_BIAS, HAS_RESIDUAL)
        else:
            at = partial_ptr + b.to(tl.int64) * (SPLITS * D) + d
            tl.store(at + split * D, y, mask=d < D)
            tl.debug_barrier()
            ticket = ticket_ptr + b * tl.num_programs(0) + tile
            if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(ticket, 0)
                whole = _joined(at, d < D, D, SPLITS, CHUNK)
                _finish(whole, *epilogue, D, HAS_BIAS, HAS_RESIDUAL)


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
        *_as_words(up, up_scale, gate, gate_scale),
        *(None if t is None else t.contiguous() for t in (up_bias, gate_bias)),
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
    block, warps, unroll, rows = _down_tiles(groups)
    tiles = -(-groups // block)
    splits = max(1, min(64, 4 * processors(h.device) // (tiles * batch), -(-n // (unroll * rows))))
    partial = y
    if splits > 1:
        room = (batch, splits, width)
        partial = torch.empty(room, dtype=torch.float32, device=h.device)
    _down_kernel[(tiles, splits, batch)](
        h.contiguous(),
        *_as_words(down, scale),
        *(None if t is None else t.contiguous() for t in (bias, residual)),
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
        CHUNK=-(-splits // -(-splits // 16)),
        STAGES=STAGES,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=warps,
        **pdl(h.device),
    )
    return y


def _as_words(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Codes as words, which 16 bytes a group fill, and scales as they are."""
    found = []
    for t in tensors:
        if t is not None:
            t = t.contiguous()
            if t.dtype == torch.uint8:
                t = (t if t.data_ptr() % 4 == 0 else t.clone()).view(torch.int32)
        found.append(t)
    return tuple(found)


def _up_tiles(n: int, block: int, device: torch.device) -> tuple[int, int, int]:
    """Rows of a block of ``block`` groups, warps, programs: 8 KB of codes and sixteen warps.

    Short rows have no more warps than read different weights.
    """
    rows = max(1, min(4, 512 // block))
    warps = min(max(4, min(16, block // 32)), max(1, rows * block // 32))  # x: 64 registers at most
    return rows, warps, max(1, min(-(-n // rows), 16 // warps * processors(device)))


def _down_tiles(groups: int) -> tuple[int, int, int, int]:
    """Groups of a tile, warps, rows that a thread sums, lanes that sum others.

    A warp reads 64 bytes of eight rows at once.
    """
    return min(4, power_of_two(groups)), 4, 2, 32
