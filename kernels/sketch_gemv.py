"""The scores of ``sketch_scores.py`` as one Triton launch: groups of up to four rows of x.

A field of a byte becomes a float without a shift and without a conversion. Masked where it lies, it
is the denormal c · 2^place · 2^-149; it multiplies x · 2^(64 - place), exactly, and sums are scaled
back by 2^85. That is one AND and one FMA per weight, where a conversion has a quarter of their rate
or less and would be the bound. Nothing may flush denormals, and |x| is below 2^63. What centres the
levels, (2^bits - 1) / 2 · Σ x, is taken off once a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import fewbit
from gnomon.kernels.launch import pdl, power_of_two, processors

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None

Plane = tuple[int, int, int, int, int, int]
"""Bits, place in the code, first byte in the row, bytes, bytes of a tile, tiles before it."""


def planes(width: int, bits: int) -> tuple[Plane, ...]:
    """The planes of a packed row and the tiles that a program reads them in."""
    found: list[Plane] = []
    start = shift = tiles = 0
    for plane in fewbit.PLANES[bits]:
        size = fewbit.padded(width) * plane // 8
        block = _tile(size)
        found.append((plane, shift, start, size, block, tiles))
        start, shift, tiles = start + size, shift + plane, tiles - -size // block
    return tuple(found)


def _tile(size: int) -> int:
    """The power of two, 64 to 2048 bytes, that leaves the fewest lanes idle in at most 16 tiles."""
    top = min(2048, power_of_two(size))
    tiles = [b for b in (top >> i for i in range(6)) if b >= min(64, top) and -(-size // b) <= 16]
    return min(tiles or [top], key=lambda block: (-(-size // block) * block, -block))


if triton is not None:

    @triton.jit
    def _load_plane(tiles, row, n, N, PLANES: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
        PLANE: tl.constexpr = PLANES[P]  # Triton 3.6 takes a plain number for no constant
        SIZE: tl.constexpr = PLANE[3]
        BLOCK: tl.constexpr = PLANE[4]
        for at in tl.static_range(0, SIZE, BLOCK):
            j = at + tl.arange(0, BLOCK)[None, :]
            mask = (n < N)[:, None] & (j < SIZE)
            place = row + PLANE[2] + j
            tiles += (tl.load(place, mask=mask, other=0, eviction_policy="evict_first"),)
        return tiles

    @triton.jit
    def _load(packed_ptr, n, N, BYTES: tl.constexpr, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Every tile of the rows n, all of them under way at once."""
        tiles = ()
        row = packed_ptr + n.to(tl.int64)[:, None] * BYTES
        for p in tl.static_range(len(PLANES)):
            tiles = _load_plane(tiles, row, n, N, PLANES, p)
        return tiles

    @triton.jit
    def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):  # type: ignore[no-untyped-def]
        found = ()
        for _ in tl.static_range(COUNT):
            found += (tl.zeros(SHAPE, dtype=tl.float32),)  # type: ignore[assignment]
        return found

    @triton.jit
    def _halves(x):  # type: ignore[no-untyped-def]
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))

    @triton.jit
    def _apart(x, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
        """(N, J) -> 2^LEVELS of (N, J / 2^LEVELS): what a thread holds of a row, one by one."""
        parts = (x,)
        for _ in tl.static_range(LEVELS):
            more = ()
            for p in tl.static_range(len(parts)):
                more += _halves(parts[p])
            parts = more  # type: ignore[assignment]
        return parts

    @triton.jit
    def _plane_sums(  # type: ignore[no-untyped-def]
        sums,
        tiles,
        x_ptr,
        first,
        M,
        D: tl.constexpr,
        PLANES: tl.constexpr,
        P: tl.constexpr,
        EACH: tl.constexpr,
    ):
        """Adds a plane to the sums of rows of x times matrices, EACH tiles to a matrix.

        A thread sums its 16 bytes of a row in a chain of FMAs (``tl.sum`` would build a tree of
        products, half as many instructions again). One row of x has its fields unrolled; with more,
        the compiler would hold all of x at once and spill.
        """
        PLANE: tl.constexpr = PLANES[P]
        BITS: tl.constexpr = PLANE[0]
        SHIFT: tl.constexpr = PLANE[1]
        SIZE: tl.constexpr = PLANE[3]
        BLOCK: tl.constexpr = PLANE[4]
        FIRST: tl.constexpr = PLANE[5]
        WAYS: tl.constexpr = len(tiles) // EACH
        ROWS: tl.constexpr = len(sums) // WAYS
        WIDE: tl.constexpr = tiles[FIRST].shape
        COUNT: tl.constexpr = min(16, BLOCK)
        LEVELS: tl.constexpr = COUNT.bit_length() - 1
        FIELDS: tl.constexpr = 8 // BITS
        TOGETHER: tl.constexpr = max(1, FIELDS // (ROWS * ROWS))
        FIELD: tl.constexpr = (1 << BITS) - 1
        parts = _zeros(len(sums), (WIDE[0], BLOCK // COUNT))
        for at in tl.static_range(0, SIZE, BLOCK):
            j = at + tl.arange(0, BLOCK)
            packed = ()
            for w in tl.static_range(WAYS):
                packed += _apart(tiles[w * EACH + FIRST + at // BLOCK], LEVELS)
            for start in tl.range(0, FIELDS, TOGETHER):
                for f in tl.static_range(TOGETHER):
                    place = (start + f) * BITS
                    column = (start + f) * SIZE + j
                    mask = (j < SIZE) & (column < D)
                    power = ((127 + 64 + SHIFT - place) << 23).to(tl.float32, bitcast=True)
                    xs = ()
                    for m in tl.static_range(ROWS):
                        row = tl.minimum(first + m, M - 1).to(tl.int64)
                        x = tl.load(x_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
                        xs += _apart(tl.broadcast_to((x * power)[None, :], WIDE), LEVELS)
                    for i in tl.static_range(COUNT):
                        more = ()
                        for m in tl.static_range(ROWS):
                            for w in tl.static_range(WAYS):
                                field = packed[w * COUNT + i].to(tl.int32) & (FIELD << place)
                                field = field.to(tl.float32, bitcast=True)
                                more += (parts[m * WAYS + w] + field * xs[m * COUNT + i],)
                        parts = more
        total = ()
        for i in tl.static_range(len(sums)):
            total += (sums[i] + tl.sum(parts[i], axis=1),)  # type: ignore[assignment]
        return total

    @triton.jit
    def _row_sum(x_ptr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        BLOCK: tl.constexpr = min(4096, triton.next_power_of_2(D))
        k = tl.arange(0, BLOCK)
        total = 0.0
        for start in tl.static_range(0, D, BLOCK):
            x = tl.load(x_ptr + start + k, mask=start + k < D, other=0.0)
            total += tl.sum(x.to(tl.float32), axis=0)
        return total

    @triton.jit
    def _product(  # type: ignore[no-untyped-def]
        total, all_x, scale_ptr, bias_ptr, n, in_n, BITS: tl.constexpr, HAS_BIAS: tl.constexpr
    ):
        scale = tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        y = (total * 2.0**85 - all_x * ((2**BITS - 1) / 2)) * scale
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        return y

    @triton.jit
    def _half_log(h, tiny, floor_ptr, n, in_n, HAS_FLOOR: tl.constexpr):  # type: ignore[no-untyped-def]
        square = h * h + tiny
        if HAS_FLOOR:
            square += tl.load(floor_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        return 0.5 * tl.log(square)

    @triton.jit
    def _sketch_kernel(  # type: ignore[no-untyped-def]
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
        y_ptr,
        M,
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
        ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """BLOCK_N neurons for ROWS rows of x, which share every byte that is read."""
        GATED: tl.constexpr = LINEAR_BITS > 0
        SHARED: tl.constexpr = LINEAR_BITS == INNER_BITS  # one walk over x serves both matrices
        WAYS: tl.constexpr = 1 + SHARED
        first = tl.program_id(0) * ROWS
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        tiles = _load(inner_ptr, n, N, INNER_BYTES, INNER)
        EACH: tl.constexpr = len(tiles)
        if GATED:
            others = _load(linear_ptr, n, N, LINEAR_BYTES, LINEAR)
            if SHARED:
                tiles += others
        if PDL:  # this program's packed weights are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        a = _zeros(ROWS * WAYS, (BLOCK_N,))
        for p in tl.static_range(len(INNER)):
            a = _plane_sums(a, tiles, x_ptr, first, M, D, INNER, p, EACH)
        if GATED and not SHARED:
            u = _zeros(ROWS, (BLOCK_N,))
            for p in tl.static_range(len(LINEAR)):
                u = _plane_sums(u, others, x_ptr, first, M, D, LINEAR, p, len(others))
        offset = tl.load(offset_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        for m in tl.static_range(ROWS):
            row = tl.minimum(first + m, M - 1).to(tl.int64)  # past the last: computed, not stored
            all_x = _row_sum(x_ptr + row * D, D)
            total = a[m * WAYS]
            inner = inner_scale_ptr, inner_bias_ptr
            h = _product(total, all_x, *inner, n, n < N, INNER_BITS, HAS_INNER_BIAS)
            h = _activate(h, ACTIVATION)
            score = offset + _half_log(h, tiny, inner_floor_ptr, n, n < N, HAS_INNER_FLOOR)
            if GATED:
                total = a[m * WAYS + 1] if SHARED else u[m]
                linear = linear_scale_ptr, linear_bias_ptr
                h = _product(total, all_x, *linear, n, n < N, LINEAR_BITS, HAS_LINEAR_BIAS)
                score += _half_log(h, tiny, linear_floor_ptr, n, n < N, HAS_LINEAR_FLOOR)
            end = tl.where(first + m < M, N, 0)
            tl.store(y_ptr + row * N + n, score, mask=n < end)


def launch_scores(
    x: Tensor,
    activation: str,
    offset: Tensor,
    inner: fewbit.Copy,
    linear: fewbit.Copy | None,
    tiny: float,
) -> Tensor:
    """Scores (M, F) fp32 of any number of rows of x; checked arguments."""
    (m, width), n = x.shape, inner.packed.shape[0]
    y = torch.empty((m, n), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y
    together = min(4, power_of_two(m))
    up = fewbit.Copy(None, None, 0, None, None) if linear is None else linear  # type: ignore[arg-type]
    matrices = [planes(width, copy.bits) for copy in (inner, up) if copy.bits]
    block_n, warps = _shape(n, matrices, together, x.device)
    pairs = [(getattr(inner, f), getattr(up, f)) for f in ("packed", "scale", "bias", "floor")]
    # Groups of rows are the fastest axis of the grid: they find their weights in the L2 cache.
    _sketch_kernel[(-(-m // together), -(-n // block_n))](
        x.contiguous(),
        *(None if t is None else t.contiguous() for pair in pairs for t in pair),
        offset.contiguous(),
        y,
        m,
        n,
        tiny,
        D=width,
        INNER=matrices[0],
        LINEAR=matrices[-1],
        INNER_BITS=inner.bits,
        LINEAR_BITS=up.bits,
        INNER_BYTES=fewbit.row_bytes(width, inner.bits),
        LINEAR_BYTES=fewbit.row_bytes(width, up.bits),
        ACTIVATION=activation,
        HAS_INNER_BIAS=inner.bias is not None,
        HAS_LINEAR_BIAS=up.bias is not None,
        HAS_INNER_FLOOR=inner.floor is not None,
        HAS_LINEAR_FLOOR=up.floor is not None,
        ROWS=together,
        BLOCK_N=block_n,
        num_warps=warps,
        **pdl(x.device),
    )
    return y


def _shape(
    n: int, matrices: list[tuple[Plane, ...]], together: int, device: torch.device
) -> tuple[int, int]:
    """Neurons of a program, warps: 16 KiB in flight per program, 8 with rows to share.

    Few neurons take fewer to a program, so that every processor has two programs, but not fewer
    than eight: Triton then moves x between threads value by value.
    """
    of_row = sum(-(-size // block) * block for m in matrices for _, _, _, size, block, _ in m)
    block_n = power_of_two((16384 if together == 1 else 8192) // of_row + 1) // 2
    while block_n > 8 and -(-n // block_n) < 2 * processors(device):
        block_n //= 2
    block_n = max(8, block_n)
    return block_n, max(1, min(16, power_of_two(block_n * of_row // 4096 + 1) // 2))
