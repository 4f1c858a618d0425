"""Compressed rows: weight-only int8 and int4, and low rank, with exact sizes.

A matrix is (N, W), one row per neuron (the down-projection is taken transposed), so that whole
neurons are what a token reads. Sizes are those of the stored tensors, scales included:

=========  =========================================  =====================================
method     stored                                     bytes
=========  =========================================  =====================================
int8       codes (N, W), one fp32 scale per row       N·(W + 4)
int4       two codes a byte, one fp16 scale per 32    N·18·⌈W/32⌉
lowrank    A (N, R), B (R, W) in the host's dtype      R·(N + W)·size
=========  =========================================  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from gnomon.kernels.int4_ffn import GROUP, int4_rows
from gnomon.kernels.rowscaled_linear import quantize_rows

Method = Literal["int8", "int4", "lowrank"]


def check_method(method: str) -> None:
    """Raises ValueError for an unknown method."""
    if method not in get_args(Method):
        raise ValueError(f"policy.params.rest={method!r}: use {', '.join(get_args(Method))}")


@dataclass(frozen=True)
class Compressed:
    """A matrix (N, W) in compressed form; ``tensors`` are what is stored."""

    method: str
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def dense(self) -> Tensor:
        """The matrix that they stand for, (N, W) fp32."""
        stored = self.tensors
        if self.method == "lowrank":
            return stored["a"].float() @ stored["b"].float()
        if self.method == "int8":
            return stored["codes"].float() * stored["scale"][:, None]
        return int4_rows(stored["codes"], stored["scale"], self.shape[1])


def compress(matrix: Tensor, method: str, rank: int | None = None) -> Compressed:
    """Compresses rows.

    Args:
        matrix: (N, W).
        method: ``int8`` (absolute maximum of the row over 127), ``int4`` (absolute maximum of 32
            weights over 7), ``lowrank`` (truncated SVD).
        rank: R of ``lowrank``, at most min(N, W).
    """
    check_method(method)
    shape = (matrix.shape[0], matrix.shape[1])
    if method == "lowrank":
        assert rank is not None
        u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
        root = s[:rank].sqrt()
        halves = {"a": u[:, :rank] * root, "b": root[:, None] * v[:rank]}
        kept = {k: t.to(matrix.dtype).contiguous() for k, t in halves.items()}
        return Compressed(method, shape, kept)
    if method == "int8":
        codes, scale = quantize_rows(matrix.float())
        return Compressed(method, shape, {"codes": codes, "scale": scale})
    groups = pad(matrix.float(), (0, -shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    half = (groups.abs().amax(-1) / 7).half()
    step = half.float().clamp_min(1e-12)[..., None]
    whole = ((groups / step).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    return Compressed(method, shape, {"codes": whole[:, ::2] | whole[:, 1::2] << 4, "scale": half})


def rest_bytes(method: str, rows: float, of: int, width: int, size: int, rank: int) -> float:
    """Bytes read of a compressed matrix (``of``, width) when ``rows`` of its rows are read.

    Low rank reads its B in full, however few rows of A.
    """
    if of == 0:
        return 0.0
    if method == "lowrank":
        return float(size * rank * (rows + width)) if rows > 0 else 0.0
    if method == "int8":
        return rows * (width + 4)
    return rows * (-(-width // GROUP) * GROUP / 2 + 2 * -(-width // GROUP))
