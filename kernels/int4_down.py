"""The sum of rows of int4 weights as a Triton launch: the second half of an FFN.

    y[b] = residual[b] + bias + Σ_j h[b, j] · (code[j] − 8) · scale[j, k / 32]

Codes and scales as in ``int4_up.py``. Specification: ``int4_ffn_down_reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.int4_up import code_words
from gnomon.kernels.launch import pdl, power_of_two, processors, tickets
from gnomon.kernels.split_sums import at_once

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.packed import _field, _power, _woven
    from gnomon.kernels.sketch_gemv import _zeros
    from gnomon.kernels.split_sums import _addend, _joined
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

STAGES = 3  # of the pipeline through shared memory

if triton is not None:

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
        place, mask = b.to(tl.int64) * D + d, d < D
        last = True
        if SPLITS > 1:
            at = partial_ptr + b.to(tl.int64) * (SPLITS * D) + d
            tl.store(at + split * D, y, mask=mask)
            tl.debug_barrier()
            ticket = ticket_ptr + b * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            more = _addend(bias_ptr, d, mask, HAS_BIAS)
            more += _addend(residual_ptr, place, mask, HAS_RESIDUAL)
            if SPLITS > 1:
                tl.store(ticket, 0)
                y = _joined(at, mask, D, SPLITS, CHUNK)
            tl.store(y_ptr + place, y + more, mask=mask)


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
        code_words(down),
        *(None if t is None else t.contiguous() for t in (scale, bias, residual)),
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
        CHUNK=at_once(splits, -(-32 * block // (32 * warps))),
        STAGES=STAGES,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=warps,
        **pdl(h.device),
    )
    return y


def _down_tiles(groups: int) -> tuple[int, int, int, int]:
    """Groups of a tile, warps, rows that a thread sums, lanes that sum others.

    A warp reads 64 bytes of eight rows at once.
    """
    return min(4, power_of_two(groups)), 4, 2, 32
