"""Few-bit codes: what is packed comes back, and lies where kernels look for it."""

from __future__ import annotations

import pytest
import torch

from gnomon.kernels.fewbit import PLANES, levels, pack, padded, row_bytes, unpack

WIDTHS = [1, 7, 8, 9, 40, 576, 1001]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", PLANES)
def test_round_trip(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, width))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, row_bytes(width, bits))
    assert torch.equal(unpack(packed, bits, width).long(), codes)
    for top in (0, 2**bits - 1):
        assert unpack(pack(torch.full((1, width), top), bits), bits, width).eq(top).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", PLANES)
def test_fields_lie_as_documented(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (width,))
    packed, wide = pack(codes, bits).tolist(), padded(width)
    held = [0] * wide
    start = shift = 0
    for plane in PLANES[bits]:
        size = wide * plane // 8
        for j in range(size):
            for f in range(8 // plane):
                field = packed[start + j] >> (f * plane) & (2**plane - 1)
                held[f * size + j] |= field << shift
        start, shift = start + size, shift + plane
    assert start == len(packed) == row_bytes(width, bits)
    assert held[:width] == codes.tolist()
    assert held[width:] == [0] * (wide - width)  # padding is code 0


def test_three_bits_are_two_and_one() -> None:
    packed = pack(torch.tensor([0b101, 0b010, 0, 0, 0, 0, 0, 0]), 3)
    assert packed.tolist() == [0b01, 0b10, 0b1]


@pytest.mark.parametrize(
    ("bits", "values"),
    [(1, [-0.5, 0.5]), (2, [-1.5, -0.5, 0.5, 1.5]), (3, [c - 3.5 for c in range(8)])],
)
def test_levels_are_symmetric_half_integers(bits: int, values: list[float]) -> None:
    codes = torch.arange(2**bits)
    assert levels(pack(codes, bits), bits, 2**bits).tolist() == values
    assert levels(pack(torch.arange(16), 4), 4, 16).sum() == 0


@pytest.mark.parametrize("bits", [0, 5, 8])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}: use 1, 2, 3, 4"):
        pack(torch.zeros(8), bits)
