"""Random weights and index lists for the tests of the gathered operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.kernels.rowscaled_linear import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
# batch, width, rows of weights, rows per unit
SHAPES = [
    pytest.param(1, 1, 1, 1, id="one"),
    pytest.param(1, 40, 33, 3, id="odd"),
    pytest.param(2, 300, 70, 5, id="pair"),
    pytest.param(3, 70, 24, 8, id="three"),
    pytest.param(6, 100, 48, 4, id="beyond-four"),
]
LISTS = ["all", "none", "one", "some", "counted", "own"]


def weights(n: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any]:
    """Weights (n, width) of unit gain, and the scale of int8 ones."""
    w = torch.randn(n, width, device=device) / width**0.5
    return quantize_rows(w) if dtype == torch.int8 else (w.to(dtype), None)


def lists(
    kind: str, units: int, batch: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, int]:
    """An unsorted index list, its count, and the entries that hold.

    ``counted`` has invalid entries past its count; ``own`` is a list per sequence.
    """
    if kind == "all":
        return None, None, units
    k = {"none": 0, "one": 1}.get(kind, max(1, units // 2))
    if kind == "own" and batch > 1:
        rows = [torch.randperm(units, device=device)[:k] for _ in range(batch)]
        return torch.stack(rows).int(), None, k
    index = torch.randperm(units, device=device).int()
    if kind != "counted":
        return index[:k].contiguous(), None, k
    index[k:] = 2**30
    return index, torch.tensor([k], dtype=torch.int32, device=device), k


def poison(*shape: int, device: torch.device) -> None:
    """Leaves NaN in memory that the next allocation of this size may be given."""
    for _ in range(4):
        torch.full(shape, torch.nan, device=device)
