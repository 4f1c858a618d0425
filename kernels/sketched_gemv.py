"""The sketched FFN of ``sketched_ffn.py`` as one Triton launch.

A program scores a block of neurons of one sequence, lists those that pass, and walks the list with
the next rows under way while it sums the present ones. The list is the program's own: no scan over
the grid, no second launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gnomon.kernels import fewbit
from gnomon.kernels.launch import pdl, power_of_two
from gnomon.kernels.packed import packing, per_word, words
from gnomon.kernels.sketch_gemv import Plane, planes

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
    from gnomon.kernels.packed import _factors, _numbers, _products
    from gnomon.kernels.sketch_gemv import (
        _half_log,
        _load,
        _plane_sums,
        _product,
        _row_sum,
        _zeros,
    )
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None


class Rows(NamedTuple):
    """A projection of the host by rows.

    Attributes:
        weight: (F, D).
        scale: (F,) fp32 of int8 weights, or None.
        bias: (F,) or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


if triton is not None:

    @triton.jit
    def _load_rows(  # type: ignore[no-untyped-def]
        list_ptr, up_ptr, gate_ptr, r, total, word, WORDS: tl.constexpr, GATED: tl.constexpr
    ):
        """The neurons at places r of the list, and their rows (ROWS, BLOCK) of up and gate."""
        live = r < total
        j = tl.load(list_ptr + r, mask=live, other=0)
        place = j.to(tl.int64)[:, None] * WORDS + word[None, :]
        mask = live[:, None] & (word < WORDS)[None, :]
        up = tl.load(up_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
        gate = up
        if GATED:
            gate = tl.load(gate_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
        return j, up, gate

    @triton.jit
    def _of_rows(  # type: ignore[no-untyped-def]
        y,
        offset,
        j,
        live,
        scale_ptr,
        bias_ptr,
        KIND: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
    ):
        """Sums of rows j as their projection gives them."""
        if KIND == "int8":
            y = y * 2.0**85 - offset
        if HAS_SCALE:
            y *= tl.load(scale_ptr + j, mask=live, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + j, mask=live, other=0.0).to(tl.float32)
        return y

    @triton.jit
    def _sketched_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        inner_ptr,
        linear_ptr,
        inner_scale_ptr,
        linear_scale_ptr,
        inner_bias_ptr,
        linear_bias_ptr,
        inner_floor_ptr,
        linear_floor_ptr,
        offset_ptr,
        cut_ptr,
        up_ptr,
        gate_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        up_scale_ptr,
        gate_scale_ptr,
        h_ptr,
        index_ptr,
        list_ptr,
        N,
        tiny,
        D: tl.constexpr,
        INNER: tl.constexpr,
        LINEAR: tl.constexpr,
        INNER_BITS: tl.constexpr,
        LINEAR_BITS: tl.constexpr,
        INNER_BYTES: tl.constexpr,
        LINEAR_BYTES: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_INNER_BIAS: tl.constexpr,
        HAS_LINEAR_BIAS: tl.constexpr,
        HAS_INNER_FLOOR: tl.constexpr,
        HAS_LINEAR_FLOOR: tl.constexpr,
        HAS_UP_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        KIND: tl.constexpr,
        EACH: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """BLOCK_N neurons of one sequence."""
        GATED: tl.constexpr = LINEAR_BITS > 0
        SHARED: tl.constexpr = LINEAR_BITS == INNER_BITS  # one walk over x serves both copies
        b, B = tl.program_id(1), tl.num_programs(1)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        tiles = _load(inner_ptr, n, N, INNER_BYTES, INNER)
        TILES: tl.constexpr = len(tiles)
        if GATED:
            others = _load(linear_ptr, n, N, LINEAR_BYTES, LINEAR)
            if SHARED:
                tiles += others
        if PDL:  # the copies are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        a = _zeros(1 + SHARED, (BLOCK_N,))
        for p in tl.static_range(len(INNER)):
            a = _plane_sums(a, tiles, x_ptr, b, B, D, INNER, p, TILES)
        if GATED and not SHARED:
            u = _zeros(1, (BLOCK_N,))
            for p in tl.static_range(len(LINEAR)):
                u = _plane_sums(u, others, x_ptr, b, B, D, LINEAR, p, len(others))
        row = b.to(tl.int64)
        all_x = _row_sum(x_ptr + row * D, D)
        inner = inner_scale_ptr, inner_bias_ptr
        h = _product(a[0], all_x, *inner, n, in_n, INNER_BITS, HAS_INNER_BIAS)
        score = tl.load(offset_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        h = _activate(h, ACTIVATION)
        score += _half_log(h, tiny, inner_floor_ptr, n, in_n, HAS_INNER_FLOOR)
        if GATED:
            total = a[1] if SHARED else u[0]
            linear = linear_scale_ptr, linear_bias_ptr
            h = _product(total, all_x, *linear, n, in_n, LINEAR_BITS, HAS_LINEAR_BIAS)
            score += _half_log(h, tiny, linear_floor_ptr, n, in_n, HAS_LINEAR_FLOOR)
        keep = in_n & (score >= tl.load(cut_ptr))
        tl.store(index_ptr + row * N + n, tl.where(keep, n, N), mask=in_n)
        tl.store(h_ptr + row * N + n, tl.zeros((BLOCK_N,), tl.float32), mask=in_n & (keep == 0))
        flag = keep.to(tl.int32)
        held = tl.sum(flag, axis=0)
        list_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N
        tl.store(list_ptr + tl.cumsum(flag, axis=0) - flag, n, mask=keep)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        k = tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + k, mask=k < D, other=0.0).to(tl.float32)
        xs = _factors(x, KIND, EACH)
        offset = 128.0 * all_x
        WORDS: tl.constexpr = D // EACH
        word = tl.arange(0, BLOCK_D // EACH)
        r = tl.arange(0, ROWS)
        j, w, g = _load_rows(list_ptr, up_ptr, gate_ptr, r, held, word, WORDS, GATED)
        for start in range(0, held, ROWS):
            now, w_now, g_now, live = j, w, g, start + r < held
            ahead = start + ROWS + r
            j, w, g = _load_rows(list_ptr, up_ptr, gate_ptr, ahead, held, word, WORDS, GATED)
            y = _products(_numbers(w_now, KIND), xs, 0, EACH)
            if GATED:  # one sum across threads for both
                z = _products(_numbers(g_now, KIND), xs, 0, EACH)
                y, z = tl.split(tl.sum(tl.join(y, z), axis=1))
                own = gate_scale_ptr, gate_bias_ptr
                z = _of_rows(z, offset, now, live, *own, KIND, HAS_SCALE, HAS_GATE_BIAS)
                z = _activate(z, ACTIVATION)
            else:
                y = tl.sum(y, axis=1)
            own = up_scale_ptr, up_bias_ptr
            y = _of_rows(y, offset, now, live, *own, KIND, HAS_SCALE, HAS_UP_BIAS)
            if GATED:
                y *= z
            else:
                y = _activate(y, ACTIVATION)
            tl.store(h_ptr + row * N + now, y, mask=live)


def launch_sketched(
    x: Tensor,
    cut: Tensor,
    activation: str,
    offset: Tensor,
    copies: tuple[fewbit.Copy, fewbit.Copy | None],
    up: Rows,
    gate: Rows | None,
    tiny: float,
) -> tuple[Tensor, Tensor]:
    """h (B, F) fp32 and index (B, F) int32; checked arguments."""
    (batch, width), n = x.shape, offset.shape[0]
    h = torch.empty((batch, n), dtype=torch.float32, device=x.device)
    index = torch.empty((batch, n), dtype=torch.int32, device=x.device)
    if h.numel() == 0:
        return h, index
    inner = copies[0]
    linear = fewbit.Copy(None, None, 0, None, None) if copies[1] is None else copies[1]  # type: ignore[arg-type]
    own = Rows(None, None, None) if gate is None else gate  # type: ignore[arg-type]
    matrices = [planes(width, copy.bits) for copy in (inner, linear) if copy.bits]
    block_n, rows, warps = _shape(width, matrices, up.weight.element_size())
    blocks = -(-n // block_n)
    pairs = [(getattr(inner, f), getattr(linear, f)) for f in ("packed", "scale", "bias", "floor")]
    tensors = [t for pair in pairs for t in pair] + [offset, cut]
    matrices_of = [w.contiguous() for w in (up.weight, own.weight) if w is not None]
    kind = packing(*matrices_of)
    rows_of = [words(matrices_of[0], kind), None if gate is None else words(matrices_of[1], kind)]
    tensors += [*rows_of, up.bias, own.bias, up.scale, own.scale]
    _sketched_kernel[(blocks, batch)](
        x.contiguous(),
        *(None if t is None else t.contiguous() for t in tensors),
        h,
        index,
        torch.empty(batch * blocks * block_n, dtype=torch.int32, device=x.device),
        n,
        tiny,
        D=width,
        INNER=matrices[0],
        LINEAR=matrices[-1],
        INNER_BITS=inner.bits,
        LINEAR_BITS=linear.bits,
        INNER_BYTES=fewbit.row_bytes(width, inner.bits),
        LINEAR_BYTES=fewbit.row_bytes(width, linear.bits),
        ACTIVATION=activation,
        HAS_INNER_BIAS=inner.bias is not None,
        HAS_LINEAR_BIAS=linear.bias is not None,
        HAS_INNER_FLOOR=inner.floor is not None,
        HAS_LINEAR_FLOOR=linear.floor is not None,
        HAS_UP_BIAS=up.bias is not None,
        HAS_GATE_BIAS=own.bias is not None,
        HAS_SCALE=up.scale is not None,
        KIND=kind,
        EACH=per_word(up.weight, kind),
        BLOCK_N=block_n,
        BLOCK_D=power_of_two(width),
        ROWS=rows,
        num_warps=warps,
        **pdl(x.device),
    )
    return h, index


def _shape(width: int, matrices: list[tuple[Plane, ...]], size: int) -> tuple[int, int, int]:
    """Neurons of a program, rows under way at once, warps.

    Eight neurons: wider blocks hold more than a thread's registers where rows are long (32 of them
    over 4096 columns spill, and take five times a dense FFN), and are slower where they are not. A
    thread has 16 bytes of a copy's tile, and each block of rows is 8 KB of a matrix for every four
    warps, of which long rows are given two.
    """
    tile = min(plane[4] for matrix in matrices for plane in matrix)
    block_n = 8
    warps = max(1, min(2 if width > 1024 else 4, block_n * tile // 512))
    rows = max(1, min(8, 2048 * warps // (power_of_two(width) * max(2, size))))
    return block_n, rows, warps
