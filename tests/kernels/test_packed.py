"""Weights read as words: every code is exact at any size of x, and what cannot be words is not."""

from __future__ import annotations

import pytest
import torch

from gnomon.kernels.column_gather import column_gather_triton
from gnomon.kernels.int4_ffn import int4_ffn_down_triton, int4_rows
from gnomon.kernels.packed import packing
from gnomon.kernels.row_gather import row_gather_triton
from gnomon.kernels.rowscaled_linear import rowscaled_linear_triton

SIZES = [2.0**-60, 1.0, 2.0**50]  # of x: the fields are denormals
CODES = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_is_exact(size: float, device: torch.device) -> None:
    weight = torch.stack([CODES.roll(i) for i in range(8)]).to(device)  # (8, 256)
    ones = torch.ones(8, device=device)
    for k in (0, 5, 250, 255):  # every place in a word, 128 turned off again
        x = torch.zeros(1, 256, device=device)
        x[0, k] = size
        y = row_gather_triton(x, weight, None, scale=ones, out_dtype=torch.float32)
        assert torch.equal(y[0], weight[:, k].float() * size)
        y = rowscaled_linear_triton(x, weight.repeat(512, 1), ones.repeat(512))
        assert torch.equal(y[0, :8], weight[:, k].float() * size)
    for j in range(8):
        x = torch.zeros(1, 8, device=device)
        x[0, j] = size
        y = column_gather_triton(x, weight, None, scale=ones, out_dtype=torch.float32)
        assert torch.equal(y[0], weight[j].float() * size)


@pytest.mark.parametrize("size", SIZES)
def test_every_half_byte_is_exact(size: float, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(4, 64).to(device)
    scale = torch.ones(4, 4, dtype=torch.float16, device=device)
    whole = int4_rows(codes, scale, 128)
    for j in range(4):
        h = torch.zeros(1, 4, device=device)
        h[0, j] = size
        assert torch.equal(int4_ffn_down_triton(h, codes, scale, 128)[0], whole[j] * size)


def test_what_is_read_as_words(device: torch.device) -> None:
    store = torch.zeros(4 * 96 + 8, dtype=torch.int8, device=device)
    whole, odd = store[: 4 * 96].view(4, 96), store[1 : 1 + 4 * 96].view(4, 96)
    assert packing(whole) == "int8"
    assert packing(odd) == packing(whole, odd) == packing(store[: 4 * 94].view(4, 94)) == "none"
    halves = torch.zeros(3, 6, dtype=torch.bfloat16, device=device)
    assert (packing(halves), packing(halves[:, :5].contiguous())) == ("bf16", "none")
    assert packing(halves.half()) == "fp16"
    assert packing(halves.float()) == "none"
