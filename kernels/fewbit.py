"""Few-bit weights: codes of 1 to 4 bits in bytes, one scale per row.

A code c of b bits stands for the level (c − (2^b − 1) / 2) · scale: half-integer multiples of the
scale, symmetric about zero, so that 2 bits are ±0.5 and ±1.5 scales and 1 bit is a sign.

Rows are packed in planes of 1, 2 or 4 bits; 3 bits are a plane of the low two and one of the high
bit. In a plane of p bits field f of byte j holds column f · (K8 · p / 8) + j, where K8 is K rounded
up to a multiple of 8: a byte's fields are far apart, so that consecutive bytes unpack to
consecutive columns, and a kernel reads both the bytes and x as they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}
"""Bits of a code -> bits of its planes, the lowest first."""


class Copy(NamedTuple):
    """A few-bit projection as the operators take it.

    Attributes:
        packed: (F, row_bytes) uint8.
        scale: (F,).
        bits: of a code.
        bias: (F,) or None.
        floor: (F,) mean square by which what it gives errs, or None for 0.
    """

    packed: Tensor
    scale: Tensor
    bits: int
    bias: Tensor | None
    floor: Tensor | None


def padded(width: int) -> int:
    """Columns as packed: ``width`` rounded up to a multiple of 8."""
    return -(-width // 8) * 8


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a packed row of ``width`` codes."""
    return padded(width) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (..., K), integers in [0, 2^bits), into uint8 (..., row_bytes(K, bits)).

    Raises:
        ValueError: a number of bits that is not offered.
    """
    check_bits(bits)
    codes = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[-1] % 8))
    planes, shift = [], 0
    for plane in PLANES[bits]:
        fields = ((codes >> shift) & ((1 << plane) - 1)).unflatten(-1, (8 // plane, -1))
        places = torch.arange(8 // plane, device=codes.device, dtype=torch.int32)
        planes.append((fields << (places * plane)[:, None]).sum(-2))
        shift += plane
    return torch.cat(planes, -1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 (..., row_bytes(width, bits)) -> uint8 codes (..., width)."""
    found: Tensor | None = None
    start = shift = 0
    for plane in PLANES[bits]:
        size = padded(width) * plane // 8
        part = packed[..., start : start + size]
        fields = [(part >> (f * plane)) & ((1 << plane) - 1) for f in range(8 // plane)]
        codes = torch.cat(fields, -1) << shift
        found = codes if found is None else found | codes
        start, shift = start + size, shift + plane
    assert found is not None
    return found[..., :width]


def levels(packed: Tensor, bits: int, width: int) -> Tensor:
    """What the codes stand for at a scale of 1: (..., width) fp32 half-integers."""
    return unpack(packed, bits, width).float() - (2**bits - 1) / 2


def check_bits(bits: int) -> None:
    """Raises ValueError for a number of bits that is not offered."""
    if bits not in PLANES:
        raise ValueError(f"bits={bits}: use {', '.join(map(str, PLANES))}")
