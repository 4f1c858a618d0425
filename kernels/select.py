"""Selection: the K best of N scores as an ascending list of indices, exact and without host sync.

    list[r] = { j : score[r, j] among the k[r] largest of row r },  lower index first among equals

scores (R, N) fp32, k one number or (R,) on the device; list (R, capacity) int32 and count (R,)
int32. The sets are those of :func:`gnomon.kernels.topk_mask.topk_mask`; NaN ranks as −inf.
In segments of 256 units each segment keeps its own best, which needs no pass over the whole row.

A program holds a row's scores in registers as integers of the same order and narrows an interval
round the k-th largest until exactly k are above: by where the counts at its ends say that it lies
(on the scale of scores, and on that of their bits), every fourth time and after twelve of them by
halves, so that there are at most 44 trials, and some eleven for well spread scores. Several
programs find the same cut of one row, and each lists a part of it. Rows longer than a block are
read again (from L1 and L2) at every trial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.compact import (
    compact_mask,
    compact_mask_reference,
    part_of,
    select_above,
    slots,
)
from gnomon.kernels.launch import pdl, power_of_two
from gnomon.kernels.topk_mask import ranked, topk_mask

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

__all__ = ["compact_mask", "select_above", "select_segments", "select_topk", "slots"]

BLOCK = 16384  # keys of a program in registers: 16 for each of 1024 threads


def select_topk_reference(
    scores: Tensor, k: Tensor | None, keep: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """The specification: the list of ``topk_mask``.

    Args:
        scores: (R, N) fp32, higher = keep.
        k: (R,) int32 units to keep per row, clamped to 0..min(N, capacity); None for ``keep``.
        keep: units to keep where k is None.
        capacity: places of a row in the result.

    Returns:
        index (R, capacity) int32 ascending, undefined past the count, and count (R,) int32.

    Raises:
        ValueError: keep outside 0..N or capacity, a count per row of the wrong shape.
    """
    _check(scores, k, keep, capacity)
    if k is None:
        return compact_mask_reference(topk_mask(scores, keep), capacity)
    n = scores.shape[1]
    order = ranked(scores).sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(n, device=scores.device) < k.clamp(0, min(n, capacity))[:, None]
    mask = torch.zeros_like(first).scatter_(-1, order, first)
    return compact_mask_reference(mask, capacity)


def select_segments_reference(
    scores: Tensor, keep: int, segment: int = 256
) -> tuple[Tensor, Tensor]:
    """The specification of the segment-wise choice.

    Args:
        scores: (R, N) fp32, higher = keep.
        keep: units that every segment keeps; a shorter last one keeps its share, rounded up.
        segment: consecutive units that compete.

    Returns:
        index (R, S) int32 ascending, S being what all segments keep together, and count (R,) = S.

    Raises:
        ValueError: keep outside 0..segment.
    """
    if not 0 <= keep <= segment:
        raise ValueError(f"keep={keep} is outside 0..{segment}, the units of a segment")
    parts = scores.split(segment, dim=1)
    mask = torch.cat([topk_mask(p, _share(p.shape[1], keep, segment)) for p in parts], dim=1)
    return compact_mask_reference(mask, _kept(scores.shape[1], keep, segment))


def _share(length: int, keep: int, segment: int) -> int:
    return -(-keep * length // segment)


def _kept(n: int, keep: int, segment: int) -> int:
    return n // segment * keep + _share(n % segment, keep, segment)


def _check(scores: Tensor, k: Tensor | None, keep: int, capacity: int) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores has {scores.dim()} dimensions; use (R, N)")
    rows, n = scores.shape
    if k is not None and k.shape != (rows,):
        raise ValueError(f"k has shape {tuple(k.shape)}; use ({rows},), one number per row")
    if k is None and not 0 <= keep <= min(n, capacity):
        raise ValueError(
            f"k={keep} is outside 0..{min(n, capacity)}, the units (N={n}) and the places of a "
            f"list (capacity={capacity})"
        )


if triton is not None:

    @triton.jit
    def _flipped(bits):  # type: ignore[no-untyped-def]
        """Bits of floats to integers of the same order, and back."""
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def _keys(scores_ptr, j, end):  # type: ignore[no-untyped-def]
        """Scores as int32 of the same order: NaN as −inf, −0 as 0, places past the end lowest."""
        score = tl.load(scores_ptr + j, mask=j < end, other=0.0)
        score = tl.where(score == score, score, float("-inf"))
        score = tl.where(score == 0.0, 0.0, score)
        return tl.where(j < end, _flipped(score.to(tl.int32, bitcast=True)), -2147483648)

    @triton.jit
    def _reaching(keys, scores_ptr, begin, end, cut, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """How many keys are >= cut."""
        n = (keys >= cut).to(tl.int32)
        for chunk in range(1, CHUNKS):
            j = begin + chunk * BLOCK + tl.arange(0, BLOCK)
            n += (_keys(scores_ptr, j, end) >= cut).to(tl.int32)
        return tl.sum(n, axis=0)

    @triton.jit
    def _range(keys, scores_ptr, begin, end, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """The lowest and the highest key."""
        place = tl.arange(0, BLOCK)
        lowest, highest = tl.where(begin + place < end, keys, 2147483647), keys
        for chunk in range(1, CHUNKS):
            j = begin + chunk * BLOCK + place
            more = _keys(scores_ptr, j, end)
            lowest = tl.minimum(lowest, tl.where(j < end, more, 2147483647))
            highest = tl.maximum(highest, more)
        return tl.min(lowest, axis=0), tl.max(highest, axis=0)

    @triton.jit
    def _between(low, high, share, trial):  # type: ignore[no-untyped-def]
        """A key above ``low``, not above ``high``, where so large a share of what lies between
        would be passed if it were spread evenly."""
        wide = high.to(tl.int64) - low
        middle = low + (wide // 2).to(tl.int32)
        by_bits = low + (wide.to(tl.float32) * share).to(tl.int64).to(tl.int32)
        first = _flipped(low).to(tl.float32, bitcast=True)
        last = _flipped(high).to(tl.float32, bitcast=True)
        value = first + (last - first) * share
        by_value = _flipped(value.to(tl.int32, bitcast=True))
        guess = tl.where(trial % 4 == 2, by_bits, by_value)
        found = tl.where((trial % 4 == 3) | (trial >= 12), middle, guess)
        return tl.minimum(tl.maximum(found, low + 1), high)

    @triton.jit
    def _counts(keys, cut):  # type: ignore[no-untyped-def]
        """1 for a key above the cut, 2^16 for one that equals it: a block has 2^14 of them."""
        return (keys > cut).to(tl.int32) + ((keys == cut).to(tl.int32) << 16)

    @triton.jit
    def _select_kernel(  # type: ignore[no-untyped-def]
        scores_ptr,
        k_ptr,
        index_ptr,
        count_ptr,
        N,
        keep,
        capacity,
        SEGMENT: tl.constexpr,
        HAS_K: tl.constexpr,
        CHUNKS: tl.constexpr,
        BLOCK: tl.constexpr,
        PART: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """PART units of the list of one row, or of one segment of it (SEGMENT > 0)."""
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.program_id(0).to(tl.int64)
        begin, end, k, base = 0, N, keep, 0
        if HAS_K:
            k = tl.maximum(0, tl.minimum(tl.load(k_ptr + row), tl.minimum(N, capacity)))
        held = k
        if SEGMENT > 0:
            begin = tl.program_id(1) * SEGMENT
            end = tl.minimum(begin + SEGMENT, N)
            k = (keep * (end - begin) + SEGMENT - 1) // SEGMENT
            base = tl.program_id(1) * keep
            held = capacity
        scores_ptr += row * N
        place = tl.arange(0, BLOCK)
        keys = _keys(scores_ptr, begin + place, end)
        cut, high = _range(keys, scores_ptr, begin, end, CHUNKS, BLOCK)
        reached, above_high = end - begin, 0  # keys >= cut, and > high; the k-th largest is between
        trial = 0
        while (reached != k) & (high > cut):  # stops as soon as a cut separates exactly k
            share = (reached - k + 0.5) / (reached - above_high).to(tl.float32)
            tried = _between(cut, high, share, trial)
            n = _reaching(keys, scores_ptr, begin, end, tried, CHUNKS, BLOCK)
            if n >= k:
                cut, reached = tried, n
            else:
                high, above_high = tried - 1, n
            trial += 1
        room = k  # equals of the cut that are taken, lowest index first
        if reached != k:
            room = k - above_high
        first = begin
        if SEGMENT == 0:
            first = tl.program_id(2) * PART
        above_before, equal_before = 0, 0  # in the parts before this one
        for chunk in range(0, tl.cdiv(first - begin, BLOCK)):
            j = begin + chunk * BLOCK + place
            if CHUNKS > 1:
                keys = _keys(scores_ptr, j, first)
            both = tl.sum(tl.where(j < first, _counts(keys, cut), 0), axis=0)
            above_before += both & 0xFFFF
            equal_before += both >> 16
        index_ptr += row * capacity + base
        j = first + tl.arange(0, PART)
        own = _keys(scores_ptr, j, end)
        both = _counts(own, cut)  # one prefix sum serves both
        before = tl.cumsum(both, axis=0) - both
        equals = equal_before + (before >> 16)
        at = above_before + (before & 0xFFFF) + tl.minimum(equals, room)
        taken = (j < end) & ((own > cut) | ((own == cut) & (equals < room)))
        tl.store(index_ptr + at, j, mask=taken)
        if first == 0:
            tl.store(count_ptr + row, held)


def _launch(
    scores: Tensor, k: Tensor | None, keep: int, capacity: int, segment: int
) -> tuple[Tensor, Tensor]:
    rows, n = scores.shape
    index = torch.empty((rows, capacity), dtype=torch.int32, device=scores.device)
    count = torch.empty(rows, dtype=torch.int32, device=scores.device)
    if rows == 0 or n == 0:
        return index, count.zero_()
    block = min(BLOCK, power_of_two(segment or n))
    segments = -(-n // segment) if segment else 1
    part = block if segment else part_of(rows, n, block, scores.device)
    _select_kernel[(rows, segments, 1 if segment else -(-n // part))](
        scores.float().contiguous(),
        k,
        index,
        count,
        n,
        keep,
        capacity,
        SEGMENT=segment,
        HAS_K=k is not None,
        CHUNKS=-(-(segment or n) // block),
        BLOCK=block,
        PART=part,
        num_warps=max(1, min(32, block // 256)),
        **pdl(scores.device),
    )
    return index, count


def select_topk_triton(
    scores: Tensor, k: Tensor | None, keep: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; same arguments, result and errors as the reference."""
    _check(scores, k, keep, capacity)
    return _launch(scores, k, keep, capacity, 0)


def select_segments_triton(scores: Tensor, keep: int, segment: int = 256) -> tuple[Tensor, Tensor]:
    """Launches the kernel; same arguments, result and errors as the reference."""
    if not 0 <= keep <= segment:
        raise ValueError(f"keep={keep} is outside 0..{segment}, the units of a segment")
    return _launch(scores, None, keep, _kept(scores.shape[1], keep, segment), segment)


select_topk_op = torch.library.custom_op(
    "gnomon::select_topk", select_topk_reference, mutates_args=()
)
select_segments = torch.library.custom_op(
    "gnomon::select_segments", select_segments_reference, mutates_args=()
)
if triton is not None:
    select_topk_op.register_kernel("cuda", select_topk_triton)
    select_segments.register_kernel("cuda", select_segments_triton)


@select_topk_op.register_fake
def _(scores: Tensor, k: Tensor | None, keep: int, capacity: int) -> tuple[Tensor, Tensor]:
    rows = scores.shape[0]
    index = scores.new_empty((rows, capacity), dtype=torch.int32)
    return index, scores.new_empty((rows,), dtype=torch.int32)


@select_segments.register_fake
def _(scores: Tensor, keep: int, segment: int = 256) -> tuple[Tensor, Tensor]:
    rows, n = scores.shape
    index = scores.new_empty((rows, _kept(n, keep, segment)), dtype=torch.int32)
    return index, scores.new_empty((rows,), dtype=torch.int32)


def select_topk(scores: Tensor, k: Tensor | int, capacity: int) -> tuple[Tensor, Tensor]:
    """The k best of every row, ascending: the operator ``gnomon::select_topk``.

    Args:
        scores: (R, N) fp32, higher = keep.
        k: one number, or (R,) int32 on the device (clamped to 0..min(N, capacity)).
        capacity: places of a row in the result.

    Returns:
        index (R, capacity) int32 ascending, undefined past the count, and count (R,) int32.

    Raises:
        ValueError: k outside 0..N or capacity.
    """
    if isinstance(k, Tensor):
        return select_topk_op(scores, k, 0, capacity)
    return select_topk_op(scores, None, k, capacity)
