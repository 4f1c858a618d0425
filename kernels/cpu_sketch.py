"""The scores of ``sketch_scores.py`` on a CPU: a kernel in C (`cpu_sketch.c`) for a few rows of x.

The reference unpacks whole matrices at every call; it serves more rows, which share that, and
machines without a compiler.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from gnomon.kernels.cpu_gather import ACTIVATION_CODES, MOST_ROWS, address, address_fp32
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

    def both(field: str) -> tuple[Tensor | None, Tensor | None]:
        return getattr(inner, field), None if linear is None else getattr(linear, field)

    vectors = (*both("scale"), *both("bias"), *both("floor"), offset)
    lib.gnomon_sketch(
        address_fp32(x, held),
        *(address(packed, held) for packed in both("packed")),
        *(address_fp32(vector, held) for vector in vectors),
        y.data_ptr(),
        *(m, width, n, inner.bits, 0 if linear is None else linear.bits),
        *(ACTIVATION_CODES[activation], torch.get_num_threads(), tiny),
    )
    return y
