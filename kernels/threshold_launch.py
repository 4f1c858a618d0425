"""The launch of a walk over channels (:mod:`gnomon.kernels.threshold_walk`), and how it is cut.

Tiles are narrow, so that they fill the processors and no sum is split, which would cost a store, a
ticket and a second sum (4 to 5 µs of a launch on an H100). Where there are too few tiles for that,
the last split of a tile adds them up in their order. Either way the result is the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gnomon.kernels import threshold_walk
from gnomon.kernels.launch import TICKETS, pdl, power_of_two, processors, tickets
from gnomon.kernels.packed import packing, words
from gnomon.kernels.split_sums import at_once

LONG = 8192  # channels of a tile that two programs share


class Shape(NamedTuple):
    """How a launch is cut.

    Attributes:
        block_n: outputs of a program.
        unroll: rows that a thread sums in its registers at a step.
        splits: programs that share the channels of a tile.
        warps: of a program.
    """

    block_n: int
    unroll: int
    splits: int
    warps: int


def launch_walk(
    x: Tensor,
    weight_t: Tensor,
    gate_t: Tensor | None,
    threshold: Tensor,
    bias: Tensor | None,
    gate_bias: Tensor | None,
    scale: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str,
    given: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (B, N) of checked arguments: x (B, W), weight_t and gate_t (W, N)."""
    (batch, width), n = x.shape, weight_t.shape[1]
    y = torch.empty((batch, n), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    together = min(4, power_of_two(batch))
    groups, gated = -(-batch // together), gate_t is not None
    size = weight_t.element_size()
    shape = _shape(width, n, together, groups, gated, size, x.device)
    tiles = -(-n // shape.block_n)
    if groups * tiles > TICKETS:
        raise ValueError(f"a batch of {batch} with N={n} is more than one launch serves: split x")
    lanes = _lanes(shape, size)
    # fewer numbers of x than threads: Triton then loads them where they are used
    rounds = min(shape.unroll, power_of_two(-(-shape.unroll * lanes // (shape.warps * 32)) + 1))
    partial = y
    if shape.splits > 1:
        sums = (batch, shape.splits, 1 + gated, n)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    matrices = [t.contiguous() for t in (weight_t, gate_t) if t is not None]
    kind = packing(*matrices) if size > 1 else "none"
    up, gate = (words(t, kind) for t in (matrices[0], matrices[-1]))
    tensors = (up, gate, threshold.float(), bias, gate_bias, scale, given, residual)
    threshold_walk._walk_kernel[(tiles, shape.splits, groups)](
        x.contiguous(),
        *(None if t is None else t.contiguous() for t in tensors),
        y,
        partial,
        tickets(x.device),
        batch,
        width,
        N=n,
        KIND=kind,
        GATED=gated,
        PER_CHANNEL=threshold.shape[0] > 1 or width == 1,
        HAS_BIAS=bias is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_SCALE=scale is not None,
        HAS_GIVEN=given is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        BATCH=together,
        SPLITS=shape.splits,
        ROUNDS=rounds,
        UNROLL=shape.unroll // rounds,
        LANES=lanes,
        BLOCK_N=shape.block_n,
        CHUNK=at_once(shape.splits, 2 * together * (1 + gated)),  # a word has two outputs
        num_warps=shape.warps,
        **pdl(x.device),
    )
    return y


def _lanes(shape: Shape, size: int) -> int:
    """Rows that the threads of a program read at once, 16 bytes each."""
    return max(1, shape.warps * 32 * (16 // size) // shape.block_n)


def _shape(
    width: int, n: int, together: int, groups: int, gated: bool, size: int, device: torch.device
) -> Shape:
    """32 KB a step in 8 warps; the widest tiles that nearly fill the processors, or splits.

    Where tiles fill the processors about once and are long, two programs share each.
    """
    unroll = max(1, (4 if gated else 8) // together)
    enough = 0.9 * processors(device)
    for block_n in (64, 32):
        block_n = min(block_n, max(16, power_of_two(n)))
        programs = -(-n // block_n) * groups
        if programs >= enough:
            long = width >= LONG and programs < 1.2 * processors(device)
            return Shape(block_n, unroll, 2 if long else 1, 8)
    block_n = min(64, max(16, power_of_two(n)))
    programs = -(-n // block_n) * groups
    step = unroll * _lanes(Shape(block_n, unroll, 1, 8), size)
    splits = min(round(1.5 * processors(device) / programs), -(-width // step))
    return Shape(block_n, unroll, max(1, splits), 8)
