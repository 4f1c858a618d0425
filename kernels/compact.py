"""Compaction: masks and thresholds to ascending lists of indices, and lists to places.

    list[r] = { j : mask[r, j] }   or   { j : score[r, j] >= threshold }
                                   or   { j : |x[r, j]| > threshold }
    slot[r, list[r, s]] = s for s < count[r], −1 elsewhere

mask (R, N) bool, scores and x (R, N); list (R, capacity) int32 ascending, count (R,) int32, slot
(R, N) int32. A list that would overflow its capacity keeps its lowest indices. NaN is never kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.launch import pdl, power_of_two, processors

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None


def compact_mask_reference(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The specification of a mask's list.

    Args:
        mask: (R, N) bool.
        capacity: places of a row in the result.

    Returns:
        index (R, capacity) int32 ascending, undefined past the count, and count (R,) int32.
    """
    rows, n = mask.shape
    place = mask.cumsum(-1, dtype=torch.int64) - 1
    place = place.masked_fill(~mask, capacity).clamp(max=capacity)  # the last column is cut off
    index = torch.zeros((rows, capacity + 1), dtype=torch.int32, device=mask.device)
    unit = torch.arange(n, dtype=torch.int32, device=mask.device).expand(rows, n)
    index = index.scatter_(-1, place, unit)[:, :capacity].contiguous()
    return index, mask.sum(-1, dtype=torch.int32).clamp(max=capacity)


def select_above_reference(
    scores: Tensor, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """The specification of a threshold's list.

    Args:
        scores: (R, N).
        threshold: one number () or (1,), one per unit (N,) or (1, N), or one per row (R,) or
            (R, 1); where R == N > 1 say (R, 1) or (1, N).
        capacity: places of a row in the result.

    Returns:
        index (R, capacity) int32 ascending, undefined past the count, and count (R,) int32.

    Raises:
        ValueError: a threshold that does not fit the scores.
    """
    return compact_mask_reference(scores >= _column(scores, threshold), capacity)


def select_passing_reference(x: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The specification of the list of what passes, as in ``threshold_gemv``: |x| > threshold.

    Args, result and errors as :func:`select_above_reference`.
    """
    return compact_mask_reference(x.float().abs() > _column(x, threshold), capacity)


def slots_reference(index: Tensor, count: Tensor, n: int) -> Tensor:
    """The specification of the inverse of a list.

    Args:
        index: (R, S) int32, in any order.
        count: (R,) int32 entries that hold.
        n: units.

    Returns:
        (R, n) int32: the place of each unit in its row's list, −1 where it is absent.
    """
    rows, places = index.shape
    place = torch.arange(places, dtype=torch.int32, device=index.device).expand(rows, places)
    unit = index.long().masked_fill(place >= count[:, None], n)  # the last column is cut off
    out = torch.full((rows, n + 1), -1, dtype=torch.int32, device=index.device)
    return out.scatter_(-1, unit, place)[:, :n].contiguous()


def _column(scores: Tensor, threshold: Tensor) -> Tensor:
    """The threshold as (1, 1), (1, N) or (R, 1)."""
    rows, n = scores.shape
    shape = tuple(threshold.shape)
    if shape in ((), (1,), (1, 1)):
        return threshold.reshape(1, 1)
    if shape in ((1, n), (rows, 1)):
        return threshold
    if shape in ((n,), (rows,)) and rows != n:
        return threshold.reshape((1, n) if shape == (n,) else (rows, 1))
    raise ValueError(
        f"threshold has shape {shape} for scores of {(rows, n)}; use (), (1, {n}) or ({rows}, 1)"
    )


if triton is not None:

    @triton.jit
    def _kept(  # type: ignore[no-untyped-def]
        value_ptr,
        cut_ptr,
        j,
        end,
        unit_stride,
        HAS_THRESHOLD: tl.constexpr,
        PASSING: tl.constexpr,
    ):
        """1 for every unit j < end that is kept."""
        value = tl.load(value_ptr + j, mask=j < end, other=0)
        if HAS_THRESHOLD:
            cut = tl.load(cut_ptr + j * unit_stride, mask=j < end, other=0.0)
            value = value.to(tl.float32)
            keep = tl.abs(value) > cut if PASSING else value >= cut
        else:
            keep = value != 0
        return ((j < end) & keep).to(tl.int32)

    @triton.jit
    def _compact_kernel(  # type: ignore[no-untyped-def]
        value_ptr,
        threshold_ptr,
        index_ptr,
        count_ptr,
        N,
        capacity,
        row_stride,
        unit_stride,
        HAS_THRESHOLD: tl.constexpr,
        PASSING: tl.constexpr,
        BLOCK: tl.constexpr,
        PART: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """PART units of the list of one row, each at its prefix sum.

        A program counts what the parts before its own keep itself: that is sooner done than waiting
        for them.
        """
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * PART
        value_ptr += row * N
        threshold_ptr += row * row_stride
        before = 0
        for start in range(0, first, BLOCK):
            j = start + tl.arange(0, BLOCK)
            kept = _kept(value_ptr, threshold_ptr, j, first, unit_stride, HAS_THRESHOLD, PASSING)
            before += tl.sum(kept, axis=0)
        j = first + tl.arange(0, PART)
        kept = _kept(value_ptr, threshold_ptr, j, N, unit_stride, HAS_THRESHOLD, PASSING)
        at = before + tl.cumsum(kept, axis=0) - kept
        tl.store(index_ptr + row * capacity + at, j, mask=(kept > 0) & (at < capacity))
        if first + PART >= N:
            tl.store(count_ptr + row, tl.minimum(before + tl.sum(kept, axis=0), capacity))

    @triton.jit
    def _slots_kernel(  # type: ignore[no-untyped-def]
        index_ptr,
        count_ptr,
        slot_ptr,
        S,
        N,
        BLOCK_S: tl.constexpr,
        BLOCK_N: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """One row: −1 everywhere, then, after a barrier, the place of every listed unit."""
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.program_id(0).to(tl.int64)
        for start in range(0, N, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            tl.store(slot_ptr + row * N + j, tl.full((BLOCK_N,), -1, tl.int32), mask=j < N)
        tl.debug_barrier()
        held = tl.minimum(tl.load(count_ptr + row), S)
        for start in range(0, held, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            unit = tl.load(index_ptr + row * S + s, mask=s < held, other=-1)
            inside = (s < held) & (unit >= 0) & (unit < N)
            tl.store(slot_ptr + row * N + unit, s, mask=inside)


def part_of(rows: int, n: int, block: int, device: torch.device) -> int:
    """Units that one program lists: all of a row's, fewer where rows leave processors idle."""
    programs = max(1, processors(device) // rows)
    return max(min(block, 1024), min(block, power_of_two(-(-n // programs))))


def _compact(
    value: Tensor, threshold: Tensor | None, capacity: int, passing: bool = False
) -> tuple[Tensor, Tensor]:
    rows, n = value.shape
    index = torch.empty((rows, capacity), dtype=torch.int32, device=value.device)
    count = torch.empty(rows, dtype=torch.int32, device=value.device)
    if rows == 0:
        return index, count
    if n == 0:
        return index, count.zero_()
    block = min(8192, power_of_two(n))
    part = part_of(rows, n, block, value.device)
    _compact_kernel[(rows, -(-n // part))](
        value.contiguous(),
        value if threshold is None else threshold,
        index,
        count,
        n,
        capacity,
        0 if threshold is None or threshold.shape[0] == 1 else 1,
        0 if threshold is None or threshold.shape[1] == 1 else 1,
        HAS_THRESHOLD=threshold is not None,
        PASSING=passing,
        BLOCK=block,
        PART=part,
        num_warps=max(1, min(32, block // 256)),
        **pdl(value.device),
    )
    return index, count


def compact_mask_triton(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Launches the kernel; same arguments and result as the reference."""
    return _compact(mask.contiguous().view(torch.uint8), None, capacity)


def select_above_triton(scores: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Launches the kernel; same arguments, result and errors as the reference."""
    cut = _column(scores, threshold).float().contiguous()
    return _compact(scores, cut, capacity)


def select_passing_triton(x: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Launches the kernel; same arguments, result and errors as the reference."""
    return _compact(x, _column(x, threshold).float().contiguous(), capacity, passing=True)


def slots_triton(index: Tensor, count: Tensor, n: int) -> Tensor:
    """Launches the kernel; same arguments and result as the reference."""
    rows, places = index.shape
    slot = torch.empty((rows, n), dtype=torch.int32, device=index.device)
    if slot.numel():
        _slots_kernel[(rows,)](
            index.contiguous(),
            count,
            slot,
            places,
            n,
            BLOCK_S=min(1024, power_of_two(places)),
            BLOCK_N=min(1024, power_of_two(n)),
            num_warps=max(1, min(8, power_of_two(n) // 128)),
            **pdl(index.device),
        )
    return slot


compact_mask = torch.library.custom_op(
    "gnomon::compact_mask", compact_mask_reference, mutates_args=()
)
select_above = torch.library.custom_op(
    "gnomon::select_above", select_above_reference, mutates_args=()
)
select_passing = torch.library.custom_op(
    "gnomon::select_passing", select_passing_reference, mutates_args=()
)
slots = torch.library.custom_op("gnomon::slots", slots_reference, mutates_args=())
if triton is not None:
    compact_mask.register_kernel("cuda", compact_mask_triton)
    select_above.register_kernel("cuda", select_above_triton)
    select_passing.register_kernel("cuda", select_passing_triton)
    slots.register_kernel("cuda", slots_triton)


def _lists(like: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    rows = like.shape[0]
    index = like.new_empty((rows, capacity), dtype=torch.int32)
    return index, like.new_empty((rows,), dtype=torch.int32)


@compact_mask.register_fake
def _(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return _lists(mask, capacity)


@select_above.register_fake
def _(scores: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return _lists(scores, capacity)


@select_passing.register_fake
def _(x: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return _lists(x, capacity)


@slots.register_fake
def _(index: Tensor, count: Tensor, n: int) -> Tensor:
    return index.new_empty((index.shape[0], n), dtype=torch.int32)
