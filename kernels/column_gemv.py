"""Column-gathered projection as Triton launches: GEMV up to four sequences.

    y[b] = residual[b] + bias + Σ_{s, r} x[b, s·block + r] · scale[j] · weight_t[j],
    j = index[s]·block + r

Specification: ``column_gather_reference``; larger batches are in ``column_batch.py``, int8 that
can be read as words in ``column_words.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import column_words
from gnomon.kernels.column_batch import columns_batch
from gnomon.kernels.launch import pdl, power_of_two, processors, tickets
from gnomon.kernels.packed import packing, words
from gnomon.kernels.split_sums import at_once

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _load_rows, _reads, _rows
    from gnomon.kernels.split_sums import _addend, _joined
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None


if triton is not None:

    @triton.jit
    def _column_kernel(  # type: ignore[no-untyped-def]
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

        The next UNROLL x ROWS rows of weights are under way while as many are summed; ROWS is the
        number of warps, so that a warp reads whole rows and sums over UNROLL in its registers.
        """
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
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        b = (first + tl.arange(0, BATCH)).to(tl.int64)
        inside = b < B
        lane = tl.arange(0, UNROLL)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        r = begin + lane
        own = first * INDEX_STRIDE
        row = _rows(r, end, index_ptr, own, UNIT, HAS_INDEX)
        read = _reads(r < end, r, wanted_ptr, before, UNIT, HAS_WANTED)
        w = _load_rows(weight_ptr, row, read, d, in_d, D, BLOCK_D)
        if PDL:  # this program's first weights are under way while the launch before drains
            if EARLY:
                gdc_wait()
            gdc_launch_dependents()
        x_row = x_ptr + b[:, None, None] * (S * UNIT)
        acc = tl.zeros((BATCH, ROWS, BLOCK_D), dtype=tl.float32)
        for start in range(begin, end, UNROLL * ROWS):
            x_mask = inside[:, None, None] & read[None, :, :]
            x = tl.load(x_row + r[None, :, :], mask=x_mask, other=0.0).to(tl.float32)
            if HAS_SCALE:
                x *= tl.load(scale_ptr + row, mask=read, other=0.0)[None, :, :]
            w_now = w
            r = start + UNROLL * ROWS + lane
            row = _rows(r, end, index_ptr, own, UNIT, HAS_INDEX)
            read = _reads(r < end, r, wanted_ptr, before, UNIT, HAS_WANTED)
            w = _load_rows(weight_ptr, row, read, d, in_d, D, BLOCK_D)
            acc += tl.sum(w_now.to(tl.float32)[None, :, :, :] * x[:, :, :, None], axis=1)
        y = tl.sum(acc, axis=1)
        column = d[None, :] + tl.zeros((BATCH, 1), dtype=tl.int32)
        place = b[:, None] * D + column
        mask = inside[:, None] & in_d[None, :]
        last = True
        if SPLITS > 1:
            at = partial_ptr + b[:, None] * (SPLITS * D) + column
            tl.store(at + split * D, y, mask=mask)
            tl.debug_barrier()
            ticket = ticket_ptr + group * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            more = _addend(bias_ptr, column, mask, HAS_BIAS)
            more += _addend(residual_ptr, place, mask, HAS_RESIDUAL)
            if SPLITS > 1:
                tl.store(ticket, 0)
                y = _joined(at, mask, D, SPLITS, CHUNK)
            tl.store(y_ptr + place, (y + more).to(y_ptr.dtype.element_ty), mask=mask)


def launch_columns(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor | None,
    block: int,
    count: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    early: bool,
    wanted: Tensor | None = None,
) -> Tensor:
    """The sum over chosen rows of ``weight_t``: y (B, D). GEMV up to a batch of four."""
    batch, width = x.shape[0], weight_t.shape[1]
    slots = weight_t.shape[0] // block if index is None else index.shape[-1]
    own = index is not None and index.dim() == 2 and index.shape[0] > 1
    if batch > 4 and not own:
        return columns_batch(
            x, weight_t, index, block, count, scale, bias, residual, out_dtype, wanted
        )
    y = torch.empty((batch, width), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    together = 1 if own else power_of_two(batch)
    groups = -(-batch // together)
    kernel, cut = _column_kernel, _tiles
    if packing(weight_t) == "int8":
        kernel, cut = column_words._column_words_kernel, column_words.tiles
        weight_t = words(weight_t, "int8")
    unroll, lanes, block_d, splits, warps = cut(slots * block, width, groups, together, x.device)
    partial = y
    if splits > 1:
        room = (groups * together, splits, width)
        partial = torch.empty(room, dtype=torch.float32, device=x.device)
    kernel[(-(-width // block_d), splits, groups)](
        x.contiguous(),
        weight_t,
        index,
        count,
        scale,
        bias,
        None if residual is None else residual.contiguous(),
        y,
        partial,
        tickets(x.device),
        wanted,
        batch,
        slots,
        0 if wanted is None else slots - wanted.numel(),
        D=width,
        UNIT=block,
        HAS_INDEX=index is not None,
        INDEX_STRIDE=slots if own else 0,
        HAS_COUNT=count is not None,
        HAS_WANTED=wanted is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BATCH=together,
        SPLITS=splits,
        UNROLL=unroll,
        ROWS=lanes,
        BLOCK_D=block_d,
        CHUNK=at_once(splits, -(-together * block_d // (32 * warps))),
        EARLY=early or (index is None and wanted is None),
        num_warps=warps,
        **pdl(x.device),
    )
    return y


def _tiles(
    rows: int, width: int, groups: int, together: int, device: torch.device
) -> tuple[int, int, int, int, int]:
    """Steps of a sum, rows of each, columns of a tile, splits of the list, warps.

    One sequence: a program asks for 16 rows of 256 columns at once, or of a narrow sum for 64 rows
    of 64 columns, so that splits stay few; five of at most 96 registers (Triton 3.6) are resident
    on a processor. More sequences: 8 rows, and four programs. What else was timed on an H100:
    benchmarks/results/kernels/h100_split_sums.txt.
    """
    resident = 5 if together == 1 else 4
    unroll, block_d = 4 if together == 1 else 2, 256
    if together == 1 and width <= column_words.NARROW:
        unroll, block_d = 16, 64
    block_d = min(block_d, power_of_two(width))
    programs = -(-width // block_d) * groups
    most = resident * processors(device) // programs
    splits = max(1, min(64, most, -(-rows // (4 * unroll))))
    return unroll, 4, block_d, splits, 4
