"""Column-gathered projection of int8 weights as a Triton kernel: GEMV up to four sequences.

    y[b] = residual[b] + bias + Σ_{s, r} x[b, s·block + r] · scale[j] · weight_t[j],
    j = index[s]·block + r

x (B, S·block); weight_t (N, D) int8, read as words of four (:mod:`gnomon.kernels.packed`), D a
multiple of four; y (B, D). Specification: ``column_gather_reference``. Tiles are narrower than in
``column_gemv.py``, which launches it, where sums are wide, so that fewer splits have to be added.
"""

from __future__ import annotations

import torch

from gnomon.kernels.launch import power_of_two, processors

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _load_rows, _reads, _rows
    from gnomon.kernels.packed import _numbers, _power, _woven
    from gnomon.kernels.sketch_gemv import _zeros
    from gnomon.kernels.split_sums import _addend, _joined
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None

NARROW = 3000  # outputs of a sum up to which its tiles are narrow

if triton is not None:

    @triton.jit
    def _chosen(  # type: ignore[no-untyped-def]
        r,
        end,
        index_ptr,
        own,
        wanted_ptr,
        before,
        UNIT: tl.constexpr,
        HAS_INDEX: tl.constexpr,
        HAS_WANTED: tl.constexpr,
    ):
        """Weight rows of compact rows r, and which of them are read."""
        row = _rows(r, end, index_ptr, own, UNIT, HAS_INDEX)
        return row, _reads(r < end, r, wanted_ptr, before, UNIT, HAS_WANTED)

    @triton.jit
    def _added(  # type: ignore[no-untyped-def]
        sums,
        all_x,
        w,
        r,
        row,
        read,
        x_ptr,
        scale_ptr,
        first,
        B,
        width,
        HAS_SCALE: tl.constexpr,
        BATCH: tl.constexpr,
    ):
        """The sums of every sequence with rows (ROWS, UNROLL) more, and those of x."""
        factor = 1.0
        if HAS_SCALE:
            factor = tl.load(scale_ptr + row, mask=read, other=0.0)
        numbers = _numbers(w, "int8")
        found, totals = (), ()
        for m in tl.static_range(BATCH):  # past the last sequence stands the last again
            x_row = x_ptr + tl.minimum(first + m, B - 1).to(tl.int64) * width
            x = tl.load(x_row + r, mask=read, other=0.0).to(tl.float32) * factor
            totals += (all_x[m] + x,)  # type: ignore[assignment]
            x *= 2.0**64
            for i in tl.static_range(4):
                found += (sums[m * 4 + i] + tl.sum(numbers[i] * x[:, :, None], axis=1),)  # type: ignore[assignment]
        return found, totals

    @triton.jit
    def _column_words_kernel(  # type: ignore[no-untyped-def]
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
        before,
        D: tl.constexpr,
        UNIT: tl.constexpr,
        HAS_INDEX: tl.constexpr,
        INDEX_STRIDE: tl.constexpr,
        HAS_COUNT: tl.constexpr,
        HAS_WANTED: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BATCH: tl.constexpr,
        SPLITS: tl.constexpr,
        UNROLL: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        CHUNK: tl.constexpr,
        PDL: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """One tile of BLOCK_D outputs over one of SPLITS parts of the list; the last part sums.

        The next UNROLL x ROWS rows of weights are under way while as many are summed; a thread sums
        over UNROLL in its registers.
        """
        WORDS: tl.constexpr = D // 4
        BLOCK: tl.constexpr = BLOCK_D // 4
        tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        first = group * BATCH
        if PDL and not EARLY:
            gdc_wait()
        held = S
        if HAS_COUNT:
            held = tl.load(count_ptr + first * (INDEX_STRIDE > 0))
        rows = held * UNIT
        part = tl.cdiv(tl.cdiv(rows, SPLITS), UNROLL * ROWS) * (UNROLL * ROWS)
        begin = split * part
        end = tl.minimum(begin + part, rows)
        n = tile * BLOCK + tl.arange(0, BLOCK)
        in_n = n < WORDS
        lane = tl.arange(0, ROWS)[:, None] + tl.arange(0, UNROLL)[None, :] * ROWS
        own = first * INDEX_STRIDE
        lists = index_ptr, own, wanted_ptr, before
        r = begin + lane
        row, read = _chosen(r, end, *lists, UNIT, HAS_INDEX, HAS_WANTED)
        w = _load_rows(weight_ptr, row, read, n, in_n, WORDS, BLOCK)
        if PDL:  # this program's first weights are under way while the launch before drains
            if EARLY:
                gdc_wait()
            gdc_launch_dependents()
        sums = _zeros(BATCH * 4, (ROWS, BLOCK))
        all_x = _zeros(BATCH, (ROWS, UNROLL))
        source = x_ptr, scale_ptr, first, B, S * UNIT
        for start in range(begin, end, UNROLL * ROWS):
            r_now, row_now, now, w_now = r, row, read, w
            r = start + UNROLL * ROWS + lane
            row, read = _chosen(r, end, *lists, UNIT, HAS_INDEX, HAS_WANTED)
            w = _load_rows(weight_ptr, row, read, n, in_n, WORDS, BLOCK)
            sums, all_x = _added(sums, all_x, w_now, r_now, row_now, now, *source, HAS_SCALE, BATCH)
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        ys = ()
        for m in tl.static_range(BATCH):
            parts = ()
            for i in tl.static_range(4):
                parts += (sums[m * 4 + i] * (2.0**85 * _power(i, 8)),)  # type: ignore[assignment]
            total = tl.sum(tl.sum(all_x[m], axis=1), axis=0)
            ys += (tl.sum(_woven(parts), axis=0) - 128.0 * total,)  # type: ignore[assignment]
        last = True
        if SPLITS > 1:
            for m in tl.static_range(BATCH):
                at = partial_ptr + ((first + m).to(tl.int64) * SPLITS + split) * D + d
                tl.store(at, ys[m], mask=d < D)
            tl.debug_barrier()
            ticket = ticket_ptr + group * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(ticket, 0)
            for m in tl.static_range(BATCH):
                mask, place = d < tl.where(first + m < B, D, 0), (first + m).to(tl.int64) * D + d
                more = _addend(bias_ptr, d, mask, HAS_BIAS)
                more += _addend(residual_ptr, place, mask, HAS_RESIDUAL)
                y = ys[m]  # type: ignore[var-annotated]
                if SPLITS > 1:
                    at = partial_ptr + (first + m).to(tl.int64) * (SPLITS * D) + d
                    y = _joined(at, d < D, D, SPLITS, CHUNK)
                tl.store(y_ptr + place, (y + more).to(y_ptr.dtype.element_ty), mask=mask)


def tiles(
    rows: int, width: int, groups: int, together: int, device: torch.device
) -> tuple[int, int, int, int, int]:
    """Rows that a thread sums, lanes that sum others, columns of a tile, splits of the list, warps.

    128 columns, or 64 of few: of a wide sum half of what tiles of bf16 have, which leaves as many
    splits less to add, and those are what a short sum takes its time for
    (benchmarks/results/kernels/h100_words_tuning.txt).
    """
    block_d = min(128 if width > NARROW else 64, power_of_two(width))
    lanes, unroll = 2048 // block_d, max(1, 8 // together)
    programs = -(-width // block_d) * groups
    splits = max(1, min(64, 4 * processors(device) // programs, -(-rows // (lanes * unroll))))
    return unroll, lanes, block_d, splits, 4
