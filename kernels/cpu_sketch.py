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


def serving(x: Tensor) -> CDLL | None:
    """The C kernel if it can run on x (M, D): a few rows."""
    return library() if 0 < x.shape[0] <= MOST_ROWS else None


def scores(
    lib: CDLL,
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    linear: Tensor | None,
    linear_scale: Tensor | None,
    linear_bits: int,
    inner_bias: Tensor | None,
    linear_bias: Tensor | None,
    inner_floor: Tensor | None,
    linear_floor: Tensor | None,
    tiny: float,
) -> Tensor:
    """(M, F) fp32 of checked arguments, those of the reference."""
    (m, width), n = x.shape, inner.shape[0]
    y = torch.empty(m, n)
    held: list[Tensor] = []  # conversions live until the kernel has run
    factors = (inner_scale, linear_scale, inner_bias, linear_bias, inner_floor, linear_floor)
    lib.gnomon_sketch(
        address_fp32(x, held),
        address(inner, held),
        address(linear, held),
        *(address_fp32(vector, held) for vector in (*factors, offset)),
        y.data_ptr(),
        *(m, width, n, inner_bits, linear_bits, ACTIVATION_CODES[activation]),
        *(torch.get_num_threads(), tiny),
    )
    return y
