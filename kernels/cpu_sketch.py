"""Few-bit copies on a CPU: kernels in C (`cpu_sketch.c`) for a few rows of x.

    scores      as ``sketch_scores.py``
    sketched    as ``sketched_ffn.py``: scores, decides and computes what is kept in one call

The reference unpacks whole matrices at every call; it serves more rows, which share that, and
machines without a compiler.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from gnomon.kernels.cpu_gather import (
    ACTIVATION_CODES,
    MOST_ROWS,
    TYPES,
    Matrix,
    address,
    address_fp32,
)
from gnomon.kernels.cpu_library import library
from gnomon.kernels.fewbit import Copy


def serving(x: Tensor) -> CDLL | None:
    """The C kernel if it can run on x (M, D): a few rows."""
    return library() if 0 < x.shape[0] <= MOST_ROWS else None


def scores(
    lib: CDLL,
    x: Tensor,
    activation: str,
    offset: Tensor,
    inner: Copy,
    linear: Copy | None,
    tiny: float,
) -> Tensor:
    """(M, F) fp32 of checked arguments."""
    (m, width), n = x.shape, inner.packed.shape[0]
    y = torch.empty(m, n)
    held: list[Tensor] = []  # conversions live until the kernel has run
    lib.gnomon_sketch(
        *_copies(x, offset, inner, linear, held),
        y.data_ptr(),
        *(m, width, n, inner.bits, 0 if linear is None else linear.bits),
        *(ACTIVATION_CODES[activation], torch.get_num_threads(), tiny),
    )
    return y


def sketched(
    lib: CDLL,
    x: Tensor,
    cut: Tensor,
    activation: str,
    offset: Tensor,
    copies: tuple[Copy, Copy | None],
    up: Matrix,
    gate: Matrix | None,
    tiny: float,
) -> tuple[Tensor, Tensor]:
    """h (M, F) fp32 and index (M, F) int32 of checked arguments, weights contiguous."""
    (m, width), n = x.shape, up[0].shape[0]
    h, index = torch.empty(m, n), torch.empty(m, n, dtype=torch.int32)
    held: list[Tensor] = []
    pairs = list(zip(up, (None, None, None) if gate is None else gate, strict=True))
    weights, scales, biases = pairs
    inner, linear = copies
    lib.gnomon_sketched(
        *_copies(x, offset, inner, linear, held),
        address_fp32(cut, held),
        *(address(weight, held) for weight in weights),
        *(address_fp32(vector, held) for vector in (*scales, *biases)),
        h.data_ptr(),
        index.data_ptr(),
        *(m, width, n, inner.bits, 0 if linear is None else linear.bits),
        *(ACTIVATION_CODES[activation], TYPES[up[0].dtype], torch.get_num_threads(), tiny),
    )
    return h, index


def _copies(
    x: Tensor, offset: Tensor, inner: Copy, linear: Copy | None, held: list[Tensor]
) -> list[int | None]:
    """Addresses of x, of both copies and of the offset."""

    def both(field: str) -> tuple[Tensor | None, Tensor | None]:
        return getattr(inner, field), None if linear is None else getattr(linear, field)

    vectors = (*both("scale"), *both("bias"), *both("floor"), offset)
    return [
        address_fp32(x, held),
        *(address(packed, held) for packed in both("packed")),
        *(address_fp32(vector, held) for vector in vectors),
    ]
