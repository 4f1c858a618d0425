"""Sums that several programs share: how the last of them adds the splits up.

A program stores its split's sums, takes a ticket, and the one with the last ticket adds all splits
in their order, so that the result is the same every time. What follows the ticket waits for memory
as seldom as registers allow: splits are asked for side by side.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None


REGISTERS = 80  # of a thread, for splits that are asked for side by side


def at_once(splits: int, per_thread: int) -> int:
    """Splits that a thread asks for before it adds them, each ``per_thread`` numbers of its own.

    Rounds are of one size: 33 splits in rounds of at most 10 are four of 9.
    """
    most = max(1, REGISTERS // per_thread)
    return -(-splits // -(-splits // most))


if triton is not None:

    @triton.jit
    def _joined(own, mask, stride, SPLITS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
        """The sum of the splits, in their order; CHUNK independent loads at a time."""
        y = tl.zeros(mask.shape, dtype=tl.float32)
        for start in range(0, SPLITS, CHUNK):
            for i in tl.static_range(CHUNK):
                s = start + i + tl.zeros(mask.shape, dtype=tl.int32)
                held = mask & (s < SPLITS)
                y += tl.load(own + s * stride, mask=held, other=0.0, cache_modifier=".cg")
        return y

    @triton.jit
    def _addend(ptr, place, mask, HAS: tl.constexpr):  # type: ignore[no-untyped-def]
        """A bias or residual at ``place``, as large as ``mask``, in fp32; 0 where there is none."""
        y = tl.zeros(mask.shape, dtype=tl.float32)
        if HAS:
            y += tl.load(ptr + place, mask=mask, other=0.0).to(tl.float32)
        return y
